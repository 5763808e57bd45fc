//! The program as its users meet it: exit codes, errors of the configuration, help, manual,
//! completions, the unit, a first run.

#![allow(clippy::unwrap_used)] // Tests may, and so may what they share.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::need::skip;
use crate::lab::netns::Netns;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conntrail");
const COMMANDS: &[&str] =
    &["run", "check", "events", "list", "count", "stats", "schema", "completions", "man"];

fn conntrail<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    Command::new(PROGRAM).args(args).env_remove("CONNTRAIL_LOG").output().expect("it was built")
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    found.is_ok()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn a_wrong_command_line_ends_with_64() {
    for args in [
        &[][..],
        &["fly"],
        &["run", "--fast"],
        &["events", "-e", "birth"],
        &["list", "-f", "ipx"],
        &["completions", "csh"],
    ] {
        let output = conntrail(args);
        assert_eq!(code(&output), 64, "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [&["--help"][..], &["-h"], &["--version"], &["run", "--help"], &["man", "-h"]] {
        let output = conntrail(args);
        assert_eq!(code(&output), 0, "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    let help = stdout(&conntrail(["--help"]));
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
    }
    assert!(!help.contains("valve-guard"), "an inner command is not for people");
}

#[test]
fn all_errors_of_a_configuration_come_at_once_with_78() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrong.toml");
    let text = "[capture]\nrecieve_buffer = \"64MiB\"\n\n[filter]\nports = [\"http\"]\n\n\
                [[sink]]\ntype = \"file\"\n";
    fs::write(&path, text).unwrap();
    for command in ["check", "run"] {
        let output = conntrail([OsStr::new(command), "--config".as_ref(), path.as_os_str()]);
        assert_eq!(code(&output), 78);
        assert!(output.stdout.is_empty(), "{output:?}");
        let said = stderr(&output);
        let name = path.display();
        for expected in [
            format!("{name}:2:1: unknown key `recieve_buffer` in [capture]\n"),
            "2 | recieve_buffer = \"64MiB\"\n  | ^^^^^^^^^^^^^^\n".to_owned(),
            "did you mean `receive_buffer`?".to_owned(),
            format!("{name}:5:10: ports: `http` is not a port or a range of ports\n"),
            format!("{name}:7:1: sink \"file\" has no path\n"),
            format!("3 errors in {name}\n"),
        ] {
            assert!(said.contains(&expected), "{expected} in {said}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_read_ends_with_78() {
    let output = conntrail(["check", "--config", "/nonexistent/conntrail.toml"]);
    assert_eq!(code(&output), 78);
    assert!(stderr(&output).starts_with("/nonexistent/conntrail.toml: No such file"));
}

#[test]
fn a_wrong_log_setting_is_said_and_ends_with_64() {
    let output =
        Command::new(PROGRAM).arg("run").env("CONNTRAIL_LOG", "conntrail=loud").output().unwrap();
    assert_eq!(code(&output), 64);
    assert!(stderr(&output).starts_with("conntrail: CONNTRAIL_LOG: "), "{}", stderr(&output));
}

#[test]
fn check_prints_what_it_can_read_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, "[agent]\nname = \"gw1\"\n[flows]\nsnapshot = false\n").unwrap();
    let first = conntrail([OsStr::new("check"), "--config".as_ref(), path.as_os_str()]);
    assert_eq!(code(&first), 0, "{}", stderr(&first));
    let text = stdout(&first);
    assert!(text.contains("name = \"gw1\"") && text.contains("snapshot = false"), "{text}");
    assert!(text.contains("receive_buffer = \"64MiB\""), "{text}");
    assert!(text.contains("# What this host lacks:") || text.contains("# This host lacks nothing"));
    let full = dir.path().join("full.toml");
    fs::write(&full, &text).unwrap();
    let second = conntrail([OsStr::new("check"), "--config".as_ref(), full.as_os_str()]);
    assert_eq!(code(&second), 0);
    let settings = |text: &str| {
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(settings(&stdout(&second)), settings(&text));
}

#[test]
fn a_namespace_that_is_not_there_is_named() {
    let output = conntrail(["count", "--netns", "no-such-namespace"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("there is no network namespace no-such-namespace"));
    if is_root() {
        let output = conntrail(["count", "--netns", "/dev/null"]);
        assert_eq!(code(&output), 1);
        assert_eq!(stderr(&output), "conntrail: /dev/null is no network namespace\n");
    }
}

#[test]
fn completions_speak_the_shells_own_language() {
    for shell in ["bash", "zsh", "fish"] {
        let output = conntrail(["completions", shell]);
        assert_eq!(code(&output), 0);
        let script = stdout(&output);
        for command in COMMANDS {
            assert!(script.contains(command), "{command} for {shell}");
        }
        if !has(shell) {
            skip(&format!("{shell} is not installed, its completions are not parsed"));
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        fs::write(&path, script).unwrap();
        // -n: read, and run nothing.
        let parsed = Command::new(shell).arg("-n").arg(&path).output().unwrap();
        assert!(parsed.status.success(), "{shell}: {parsed:?}");
    }
}

#[test]
fn there_is_a_manual_page_for_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("man1");
    let output = conntrail([OsStr::new("man"), "--out".as_ref(), out.as_os_str()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let mut names: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected: Vec<_> =
        COMMANDS.iter().map(|command| format!("conntrail-{command}.1")).collect();
    expected.push("conntrail.1".to_owned());
    expected.sort();
    assert_eq!(names, expected);
    let page = stdout(&conntrail(["man"]));
    assert_eq!(page, fs::read_to_string(out.join("conntrail.1")).unwrap());
    if !has("man") {
        return skip("man is not installed, pages are not rendered");
    }
    for name in names {
        let path = out.join(&name);
        let rendered = Command::new("man")
            .args(["--warnings=all", "-l"])
            .arg(&path)
            .env("MANWIDTH", "80")
            .env("MAN_KEEP_STDERR", "1")
            .output()
            .unwrap();
        assert!(rendered.status.success(), "{name}: {rendered:?}");
        assert_eq!(stderr(&rendered), "", "{name}");
        assert!(stdout(&rendered).contains("EXAMPLES"), "{name}");
    }
}

#[test]
fn a_reader_that_goes_away_is_a_quiet_end() {
    let mut child = Command::new(PROGRAM)
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before anything is read: the script is larger than what a pipe holds only with luck,
    // but the pipe has no reader from here on.
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(said, "");
}

#[test]
fn the_kernel_answers_the_plain_questions() {
    if !is_root() {
        return skip("asking the kernel needs root");
    }
    let count = conntrail(["count"]);
    assert_eq!(code(&count), 0, "{}", stderr(&count));
    stdout(&count).trim_end().parse::<u32>().expect("one number");
    let json: serde_json::Value =
        serde_json::from_slice(&conntrail(["count", "-o", "json"]).stdout).unwrap();
    assert!(json["limit"].as_u64().is_some_and(|limit| limit > 0), "{json}");

    let cpus = std::thread::available_parallelism().unwrap().get();
    let table = stdout(&conntrail(["stats"]));
    assert!(table.starts_with("cpu  "), "{table}");
    assert!(table.lines().count() >= cpus + 2, "{table}");
    let lines = stdout(&conntrail(["stats", "-o", "json"]));
    assert!(lines.lines().count() >= cpus, "{lines}");
    for line in lines.lines() {
        let cpu: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(cpu["cpu"].is_u64() && cpu["insert_failed"].is_u64(), "{line}");
    }
    let list = conntrail(["list"]);
    assert_eq!(code(&list), 0, "{}", stderr(&list));
}

#[test]
fn without_privilege_it_ends_with_77_and_says_what_to_do() {
    if !is_root() {
        return skip("dropping privileges needs root");
    }
    // A copy where others may read it: checkouts often lie in a home that is closed to them.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("conntrail");
    fs::copy(PROGRAM, &program).unwrap();
    let unprivileged = |args: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"])
            .args(["--inh-caps=-all", "--"])
            .arg(&program)
            .args(args)
            .output()
    };
    if !unprivileged(&["--version"]).is_ok_and(|output| output.status.success()) {
        return skip("setpriv is missing");
    }
    for args in [&["count"][..], &["list"], &["stats"], &["run"], &["events"]] {
        let output = unprivileged(args).unwrap();
        assert_eq!(code(&output), 77, "{args:?}: {output:?}");
        assert!(stderr(&output).contains("CAP_NET_ADMIN"), "{args:?}: {}", stderr(&output));
    }
    let check = unprivileged(&["check"]).unwrap();
    assert_eq!(code(&check), 0, "the configuration is right all the same: {check:?}");
}

#[test]
fn the_unit_is_silent_under_systemd_analyze() {
    if !has("systemd-analyze") {
        return skip("systemd-analyze is not installed");
    }
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/conntrail.service");
    let text = fs::read_to_string(unit).unwrap();
    assert!(text.contains("\nExecStart=/usr/bin/conntrail run"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("conntrail.service");
    fs::write(&copy, text.replace("/usr/bin/conntrail", PROGRAM)).unwrap();
    let verified = Command::new("systemd-analyze").arg("verify").arg(&copy).output().unwrap();
    assert!(verified.status.success(), "{verified:?}");
    assert_eq!((stdout(&verified), stderr(&verified)), (String::new(), String::new()));
}

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Manager { socket }
    }

    fn hears(&self, word: &str) {
        let mut buffer = [0; 512];
        let length = self.socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{word}: {e}"));
        let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(said.lines().any(|line| line == word), "{word} in {said}");
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

/// One datagram to a closed port of loopback: a flow for conntrack.
fn make_flow(netns: &Netns, port: u16) {
    netns.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"x", ("127.0.0.1", port)).unwrap();
    });
}

fn wait_for(what: &str, mut seen: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Any rule with `ct state` makes the namespace use conntrack.
const TRACKING: &str = "table inet lab { chain seen { type filter hook output priority 0; \
                        ct state new counter; }; }";

/// The whole life of a service: ready, a record, a broken and a mended reload, counters, the stop.
#[test]
fn a_service_lives_as_its_manager_expects() {
    if !is_root() {
        return skip("a network namespace needs root");
    }
    let netns = Netns::new("life").unwrap();
    netns.nft(TRACKING).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap_or_default();
    let config = |more: &str| {
        let flows = path("flows.json");
        let text = format!(
            "[telemetry]\nlog_format = \"json\"\n{more}\n[[sink]]\ntype = \"file\"\npath = {:?}\n",
            flows.display().to_string()
        );
        fs::write(path("c.toml"), text).unwrap();
    };
    config("");
    let manager = Manager::at(&path("notify"));
    let mut child = Command::new(PROGRAM)
        .args(["run", "--netns", netns.name(), "--config"])
        .arg(path("c.toml"))
        .env("NOTIFY_SOCKET", path("notify"))
        .env_remove("CONNTRAIL_LOG")
        .stderr(fs::File::create(path("log")).unwrap())
        .spawn()
        .unwrap();

    manager.hears("READY=1");
    make_flow(&netns, 4001);
    wait_for("the first record", || read("flows.json").contains("\"dst_port\":4001"));

    config("[filter]\nprots = [1]");
    signal(&child, Signal::SIGHUP);
    manager.hears("RELOADING=1");
    manager.hears("READY=1");
    wait_for("the complaint", || read("log").contains("unknown key `prots`"));
    make_flow(&netns, 4002);
    wait_for("the second record", || read("flows.json").contains("\"dst_port\":4002"));

    config("[filter]\nports = [4004]");
    signal(&child, Signal::SIGHUP);
    manager.hears("RELOADING=1");
    manager.hears("READY=1");
    make_flow(&netns, 4003);
    make_flow(&netns, 4004);
    wait_for("the filtered record", || read("flows.json").contains("\"dst_port\":4004"));
    assert!(!read("flows.json").contains("\"dst_port\":4003"), "the new filter is in force");

    let counter = "conntrail_records_appended_total";
    assert!(!read("log").contains(counter));
    signal(&child, Signal::SIGUSR1);
    wait_for("the counters", || read("log").contains(counter));

    signal(&child, Signal::SIGTERM);
    manager.hears("STOPPING=1");
    let ended = child.wait().unwrap();
    assert!(ended.success(), "{ended:?}: {}", read("log"));
    let log = read("log");
    assert!(!log.is_empty());
    for line in log.lines() {
        let entry: serde_json::Value = serde_json::from_str(line).expect("JSON, line by line");
        assert!(entry["level"].is_string() && entry["timestamp"].is_string(), "{line}");
    }
}

#[test]
fn people_see_conntracks_columns() {
    if !is_root() {
        return skip("a network namespace needs root");
    }
    let netns = Netns::new("eyes").unwrap();
    netns.nft(TRACKING).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().join("shown");
    let mut child = Command::new(PROGRAM)
        .args(["events", "--netns", netns.name()])
        .stdout(fs::File::create(&shown).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Events before the subscription are not seen: each try is a new flow.
    let mut port = 5000;
    wait_for("an event", || {
        port += 1;
        make_flow(&netns, port);
        fs::read_to_string(&shown).unwrap().lines().count() > 1
    });
    signal(&child, Signal::SIGINT);
    assert!(child.wait().unwrap().success());
    let text = fs::read_to_string(&shown).unwrap();
    for line in text.lines() {
        assert!(line.starts_with("    [NEW] udp      17 "), "only events: {line}");
    }

    let list = stdout(&conntrail(["list", "--netns", netns.name()]));
    assert!(list.lines().all(|line| line.starts_with("udp      17 ")), "{list}");
    let count = stdout(&conntrail(["count", "--netns", netns.name()]));
    assert_eq!(list.lines().count().to_string(), count.trim_end());
    let json = stdout(&conntrail(["list", "-f", "ipv4", "-o", "json", "--netns", netns.name()]));
    assert_eq!(json.lines().count(), list.lines().count());
    for line in json.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["event"], "snapshot");
        assert_eq!(record["netns"], netns.name());
    }
    let none = conntrail(["list", "-f", "ipv6", "--netns", netns.name()]);
    assert_eq!((code(&none), stdout(&none).as_str()), (0, ""));
}
