//! SIGHUP: files are opened again, filters and sinks follow the configuration file. A configuration
//! with errors changes nothing.

use std::sync::Arc;
use std::time::Duration;

use crate::capture::{CaptureError, Item};
use crate::config::Config;
use crate::control::push;
use crate::flow::AgentAction;
use crate::pipeline::{Filter, now};

use super::{Agent, kernel_filter};

/// How long a reload waits for room in a full queue: signals wait with it.
const PATIENCE: Duration = Duration::from_secs(2);

impl Agent {
    pub(super) async fn reload(&mut self) {
        let Some(path) = self.options.config_path.clone() else {
            tracing::info!("no configuration file to read again; files are reopened");
            self.sinks.reopen();
            return;
        };
        let new = match Config::load(&path) {
            Ok(new) => new,
            Err(error) => {
                tracing::error!("the new configuration is not used, the old one stays:\n{error}");
                self.sinks.reopen();
                return;
            }
        };
        self.warn_of_restart(&new);
        if let Err(why) = self.change_filter(&new.filter).await {
            tracing::error!(why, "the filter was not changed as the configuration says");
        }
        self.sinks.apply(&new.sinks);
        self.config.sinks = new.sinks;
        tracing::info!(path = %path.display(), "the configuration was read again");
    }

    /// The kernel's filter is taken off in between, so that no flow which the old filter or the new
    /// one lets pass is lost on the way from one to the other.
    async fn change_filter(&mut self, filter: &Filter) -> Result<(), String> {
        if *filter == self.config.filter {
            return self.put(Item::Note { action: AgentAction::Reloaded, at: now() }).await;
        }
        let failed = |error: CaptureError| error.to_string();
        self.capture.set_filter(None).map_err(failed)?;
        let new = Arc::new(filter.clone());
        self.put(Item::Filter { filter: new.clone(), in_kernel: false }).await?;
        self.config.filter = filter.clone();
        let taken = self.capture.set_filter(kernel_filter(filter).as_ref()).map_err(failed)?;
        if taken && filter.fits_the_kernel() {
            self.put(Item::Filter { filter: new, in_kernel: true }).await?;
        }
        tracing::info!(in_kernel = taken, "the filter changed");
        self.put(Item::Note { action: AgentAction::Reloaded, at: now() }).await
    }

    async fn put(&self, item: Item) -> Result<(), String> {
        match tokio::time::timeout(PATIENCE, push(&self.out, item)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(closed)) => Err(closed.to_string()),
            Err(_) => Err("the queue is full because a sink stands still".to_owned()),
        }
    }

    fn warn_of_restart(&self, new: &Config) {
        let old = &self.config;
        let sections = [
            ("agent.name", old.agent_name != new.agent_name),
            ("[capture]", old.capture != new.capture),
            ("[flows]", old.snapshot != new.snapshot),
            ("[spool]", old.spool != new.spool),
            ("[telemetry]", old.telemetry != new.telemetry),
        ];
        for (section, changed) in sections {
            if changed {
                tracing::warn!("{section} changed: this takes effect after a restart");
            }
        }
    }
}
