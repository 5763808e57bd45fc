//! What the host lacks, said once at the start, and mended where the configuration asks for it.

use crate::capture::ReceiveBuffer;
use crate::config::CaptureSettings;
use crate::control::{Facts, Severity, Tracking, enable_tracking, findings};

use super::AgentError;

/// Looks at the host before anything is opened. Gives the tracking that was switched on.
pub(super) async fn prepare(settings: &CaptureSettings) -> Result<Option<Tracking>, AgentError> {
    let mut facts = Facts::read().await?;
    refuse_fatal(&facts)?;
    let mut tracking = None;
    if settings.enable_tracking {
        let on = enable_tracking().await?;
        report(&on);
        tracking = Some(on);
        facts = Facts::read().await?;
    }
    for finding in findings(&facts) {
        match finding.severity {
            Severity::Fatal | Severity::Warning => tracing::warn!("{finding}"),
            Severity::Notice => tracing::info!("{finding}"),
        }
    }
    Ok(tracking)
}

fn report(tracking: &Tracking) {
    let changed: Vec<_> = tracking.changed().map(|(name, _)| name).collect();
    tracing::info!(
        table = tracking.table(),
        settings = changed.join(","),
        "conntrack is switched on here until the agent ends"
    );
    for error in tracking.unchanged() {
        tracing::warn!(%error, "a setting stays as it is");
    }
}

fn refuse_fatal(facts: &Facts) -> Result<(), AgentError> {
    for finding in findings(facts) {
        if let Some(exit) = finding.code.exit_code() {
            return Err(AgentError::Host { message: finding.to_string(), exit });
        }
    }
    Ok(())
}

/// A buffer that the kernel made smaller holds a shorter burst.
pub(super) fn advise_on_buffer(buffer: ReceiveBuffer) {
    if !buffer.is_capped() {
        return;
    }
    tracing::warn!(
        "the kernel gave a receive buffer of {} bytes instead of {}, so shorter bursts are lost. \
         Mend it: sysctl -w net.core.rmem_max={} (or give the agent CAP_NET_ADMIN in the initial \
         user namespace)",
        buffer.got,
        buffer.asked,
        buffer.asked
    );
}
