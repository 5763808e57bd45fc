use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::resolved::{MAX_KEEP, MAX_ROTATE_SIZE, MIN_ROTATE_SIZE, default_file};
use super::*;
use crate::format::FormatKind;
use crate::pipeline::Filter;
use crate::sink::{Compress, FileConfig};
use crate::spool::{SpoolConfig, WhenFull};

fn read(text: &str) -> Config {
    Config::from_str(text, "test.toml").unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> ConfigError {
    Config::from_str(text, "test.toml").expect_err("the text is wrong")
}

/// Line and message of each problem.
fn lines(text: &str) -> Vec<(usize, String)> {
    refused(text).problems().iter().map(|at| (at.line, at.message.clone())).collect()
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(read(""), Config::default());
    assert_eq!(read("").sinks, [SinkSettings::stdout()]);
    assert_eq!(read("[capture]\n[filter]\n[flows]\n[spool]\n[telemetry]"), Config::default());
}

#[test]
fn the_file_that_is_shipped_says_the_defaults() {
    let shipped = include_str!("../../config/conntrail.toml");
    assert_eq!(read(shipped), Config::default());
}

#[test]
fn the_shipped_file_shows_every_key_and_its_default() {
    let shipped = include_str!("../../config/conntrail.toml");
    // Each commented-out setting, switched on.
    let on: String = shipped
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut config = read(&on);
    assert_eq!(config.agent_name, "gw1");
    config.agent_name = Config::default().agent_name;
    let file = default_file(PathBuf::from("/var/log/conntrail/flows.json"));
    let [stdout, flows] = config.sinks.try_into().expect("two sinks are shown");
    assert_eq!(stdout, SinkSettings::stdout());
    assert_eq!(flows.target, SinkTarget::File(file));
    config.sinks = vec![stdout];
    assert_eq!(config, Config::default());
    for line in Config::default().describe().lines().filter(|line| line.contains(" = ")) {
        let key = line.split(" = ").next().unwrap();
        assert!(on.lines().any(|on| on.starts_with(&format!("{key} ="))), "{key} is not shown");
    }
}

#[test]
fn each_key_reaches_its_setting() {
    let config = read(
        r#"
        [agent]
        name = "gw1"
        [capture]
        events = ["new", "update", "destroy", "expect"]
        method = "socket"
        reliable = false
        receive_buffer = "4MiB"
        enable_tracking = true
        [filter]
        nat_only = true
        protocols = ["tcp", 47, "17"]
        networks = ["192.0.2.0/24", "!10.0.0.0/8", "2001:db8::1"]
        ports = [443, "53", "8000-8100"]
        marks = ["0x10/0xff", 7]
        zones = [0, 65535]
        [flows]
        snapshot = false
        [spool]
        mode = "memory"
        max_size = 1048576
        when_full = "drop_newest"
        [[sink]]
        type = "stdout"
        format = "conntrack"
        [[sink]]
        name = "flows"
        type = "file"
        fields = ["ts", "src_ip"]
        path = "/tmp/flows.json"
        rotate_size = "off"
        rotate_every = "1d"
        keep = "all"
        compress = "none"
        [telemetry]
        log = "debug"
        log_format = "json"
        "#,
    );
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
    let all = EventKinds { new: true, update: true, destroy: true, expect: true };
    let expected = Config {
        agent_name: "gw1".to_owned(),
        capture: CaptureSettings {
            events: all,
            method: Method::Socket,
            reliable: false,
            receive_buffer: 4 << 20,
            enable_tracking: true,
        },
        filter: Filter {
            nat_only: true,
            protocols: vec![6, 47, 17],
            include: nets(&["192.0.2.0/24", "2001:db8::1/128"]),
            exclude: nets(&["10.0.0.0/8"]),
            ports: vec![443..=443, 53..=53, 8000..=8100],
            marks: vec![(0x10, 0xff), (7, u32::MAX)],
            zones: vec![0, 65535],
        },
        snapshot: false,
        spool: SpoolConfig { max_size: 1 << 20, when_full: WhenFull::DropNewest },
        sinks: vec![
            SinkSettings { format: FormatKind::Conntrack, ..SinkSettings::stdout() },
            SinkSettings {
                name: "flows".to_owned(),
                format: FormatKind::Json,
                fields: FieldChoice::List(vec!["ts".to_owned(), "src_ip".to_owned()]),
                target: SinkTarget::File(FileConfig {
                    path: PathBuf::from("/tmp/flows.json"),
                    rotate_size: None,
                    rotate_every: Some(Duration::from_secs(86_400)),
                    keep: None,
                    compress: Compress::None,
                }),
            },
        ],
        telemetry: TelemetrySettings { log: LogLevel::Debug, log_format: LogFormat::Json },
    };
    assert_eq!(config, expected);
}

#[test]
fn all_errors_are_said_at_once_with_their_lines() {
    let text = r#"[agent]
name = 7
state_dir = "/var/lib/conntrail"

[capture]
events = ["new", "destory"]
recieve_buffer = "64MiB"
receive_buffer = "1KiB"
reliable = "yes"

[filter]
networks = ["10.0.0.1/8", "nowhere"]
ports = [0, "9-8"]

[spool]
mode = "disk"
max_size = 0

[[sink]]
type = "file"
keep = 0

[[sink]]
type = "stdout"
path = "/tmp/x"
format = "jsno"

[[sink]]
type = "kafka"
"#;
    insta::assert_snapshot!(refused(text).to_string());
}

#[test]
fn syntax_errors_and_others_are_said_together() {
    let found = lines("[capture]\nreliable = maybe\nbufer = 1\n[filter\nports = 1\n");
    let at: Vec<_> = found.iter().map(|(line, _)| *line).collect();
    assert!(at.contains(&2) && at.contains(&3) && at.contains(&4), "{found:?}");
    assert_eq!(found.iter().filter(|(line, _)| *line == 2).count(), 1, "{found:?}");
}

#[test]
fn a_broken_line_is_not_also_missing() {
    let found = lines("[[sink]]\ntype = \"file\"\npath = \"/tmp/x\n");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, 3);
}

#[test]
fn keys_of_later_versions_are_unknown_until_they_exist() {
    for (section, line) in [
        ("agent", "state_dir = \"/x\""),
        ("capture", "namespaces = [\"self\"]"),
        ("flows", "reconcile = true"),
        ("flows", "interim = \"off\""),
        ("spool", "fsync = \"50ms\""),
        ("telemetry", "listen = \"off\""),
    ] {
        let found = lines(&format!("[{section}]\n{line}\n"));
        assert_eq!(found.len(), 1);
        assert!(found[0].0 == 2 && found[0].1.starts_with("unknown key"), "{found:?}");
    }
    assert_eq!(lines("[enrich]")[0].1, "unknown key `enrich` in the file's top level");
}

#[test]
fn the_disk_spool_is_refused_in_plain_words() {
    let error = refused("[spool]\nmode = \"disk\"");
    assert_eq!(error.problems()[0].message, "mode: `disk` is not there yet");
    assert!(error.problems()[0].help.as_ref().unwrap().contains("in memory only"));
}

#[test]
fn a_key_in_the_wrong_section_is_sent_home() {
    let error = refused("[filter]\nreceive_buffer = 1\n");
    let help = error.problems()[0].help.clone();
    assert_eq!(help.as_deref(), Some("`receive_buffer` belongs into [capture]"));
    let error = refused("[[sink]]\ntype = \"stdout\"\nrotate_size = 1\n");
    let help = error.problems()[0].help.clone();
    assert_eq!(help.as_deref(), Some("`rotate_size` belongs into [[sink]] of type \"file\""));
}

#[test]
fn sections_of_the_wrong_kind_are_refused() {
    for (text, message) in [
        ("capture = 1", "capture is a section, not a value"),
        ("[[capture]]", "capture is a section, not a list"),
        ("[sink]\ntype = \"stdout\"", "sink is a list of sections"),
        ("sink = [1]", "a sink is a section"),
        ("sink = []", "sink: the list is empty"),
    ] {
        let found = lines(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert_eq!(found[0].1, message, "{text}");
    }
}

#[test]
fn sinks_may_not_collide() {
    let stdout_twice = "[[sink]]\ntype=\"stdout\"\n[[sink]]\nname=\"b\"\ntype=\"stdout\"\n";
    assert_eq!(
        lines(stdout_twice),
        [(3, "sink \"b\" writes to stdout, as \"stdout\" does".to_owned())]
    );
    let same_name = "[[sink]]\nname=\"a\"\ntype=\"stdout\"\n\
                     [[sink]]\nname=\"a\"\ntype=\"file\"\npath=\"/x\"\n";
    assert_eq!(lines(same_name), [(5, "there is a sink \"a\" already".to_owned())]);
    let same_path = "[[sink]]\nname=\"a\"\ntype=\"file\"\npath=\"/x/y\"\n\
                     [[sink]]\nname=\"b\"\ntype=\"file\"\npath=\"/x/.//y\"\n";
    assert_eq!(lines(same_path), [(8, "path: sink \"a\" writes to `/x/.//y` already".to_owned())]);
}

#[test]
fn a_sink_lacks_what_it_needs() {
    assert_eq!(lines("[[sink]]\ntype = \"file\"\n"), [(1, "sink \"file\" has no path".to_owned())]);
    assert_eq!(lines("\n[[sink]]\nname = \"x\"\n"), [(2, "the sink has no type".to_owned())]);
    for path in ["", "/var/log/", "a\\u0000b"] {
        let text = format!("[[sink]]\ntype = \"file\"\npath = \"{path}\"\n");
        assert_eq!(lines(&text)[0].0, 3, "{path}");
    }
}

#[test]
fn fields_need_a_format_that_has_them() {
    let found = lines("[[sink]]\ntype=\"stdout\"\nformat=\"conntrack\"\nfields=\"full\"\n");
    assert_eq!(found, [(4, "fields: the conntrack format has columns of its own".to_owned())]);
    for wrong in ["\"fulll\"", "[]", "[1]", "[\"Src\"]", "[\"ts\", \"ts\"]", "7"] {
        let text = format!("[[sink]]\ntype=\"stdout\"\nfields={wrong}\n");
        let found = lines(&text);
        assert_eq!((found.len(), found[0].0), (1, 3), "{wrong}: {found:?}");
    }
}

#[test]
fn values_of_the_wrong_type_are_named_with_what_was_found() {
    for (text, message) in [
        ("[capture]\nreliable = 1", "reliable: found an integer, not true or false"),
        ("[capture]\nevents = \"new\"", "events: found a string, not a list of events"),
        ("[capture]\nevents = [1]", "events: found an integer, not the name of an event"),
        ("[capture]\nmethod = true", "method: found a boolean, not a string"),
        ("[capture]\nreceive_buffer = 1.5", "receive_buffer: found a float, not a size"),
        ("[filter]\nports = [[]]", "ports: found a list, not one of ports"),
        ("[filter]\nzones = {}", "zones: found a table, not a list of zone numbers"),
        ("[telemetry]\nlog = 1979-05-27", "log: found a date or time, not a string"),
    ] {
        let found = lines(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(found[0].1.starts_with(message), "{text}: {found:?}");
    }
}

#[test]
fn sizes_and_durations_out_of_range_are_refused_with_advice() {
    for value in ["0", "\"1KiB\"", "65535", "\"2GiB\"", "-1", "9223372036854775807"] {
        let found = lines(&format!("[capture]\nreceive_buffer = {value}"));
        assert_eq!(found.len(), 1, "{value}");
    }
    let file = "[[sink]]\ntype = \"file\"\npath = \"/x\"\n";
    for setting in [
        "rotate_size = 0",
        "rotate_size = \"1PiB\"",
        "rotate_every = \"0s\"",
        "rotate_every = \"9999d\"",
        "rotate_every = 3600",
        "rotate_every = \"of\"",
        "keep = -1",
        "keep = \"some\"",
        "compress = \"lz4\"",
    ] {
        assert_eq!(lines(&format!("{file}{setting}\n"))[0].0, 4, "{setting}");
    }
}

#[test]
fn an_agent_name_must_fit_a_record() {
    for name in ["", "a\\nb", &"x".repeat(256)] {
        assert_eq!(lines(&format!("[agent]\nname = \"{name}\"")).len(), 1, "{name}");
    }
}

#[test]
fn files_that_are_no_configuration_are_unreadable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    let message = |path: &Path| Config::load(path).unwrap_err().to_string();
    assert!(message(&path).ends_with("c.toml: No such file or directory (os error 2)"));
    assert!(message(dir.path()).contains("directory"));
    std::fs::write(&path, b"\n\n\xff").unwrap();
    assert!(message(&path).ends_with("line 3 is not UTF-8 text"));
    assert!(message(Path::new("/dev/zero")).contains("larger than 1 MiB"));
    std::fs::write(&path, "[flows]\nsnapshot = false").unwrap();
    assert!(!Config::load(&path).unwrap().snapshot);
}

fn any_net() -> impl Strategy<Value = IpNet> {
    let v4 = (any::<u32>(), 0..=32_u8)
        .prop_map(|(ip, len)| IpNet::from(Ipv4Net::new(ip.into(), len).unwrap().trunc()));
    let v6 = (any::<u128>(), 0..=128_u8)
        .prop_map(|(ip, len)| IpNet::from(Ipv6Net::new(ip.into(), len).unwrap().trunc()));
    prop_oneof![v4, v6]
}

fn any_ports() -> impl Strategy<Value = RangeInclusive<u16>> {
    (1..=u16::MAX, 1..=u16::MAX).prop_map(|(a, b)| a.min(b)..=a.max(b))
}

fn any_filter() -> impl Strategy<Value = Filter> {
    (
        any::<bool>(),
        vec(any::<u8>(), 0..4),
        vec(any_net(), 0..4),
        vec(any_net(), 0..4),
        vec(any_ports(), 0..4),
        vec(any::<(u32, u32)>().prop_map(|(value, mask)| (value & mask, mask)), 0..4),
        vec(any::<u16>(), 0..4),
    )
        .prop_map(|(nat_only, protocols, include, exclude, ports, marks, zones)| Filter {
            nat_only,
            protocols,
            include,
            exclude,
            ports,
            marks,
            zones,
        })
}

fn any_capture() -> impl Strategy<Value = CaptureSettings> {
    let sizes =
        CaptureSettings::MIN_RECEIVE_BUFFER as usize..=CaptureSettings::MAX_RECEIVE_BUFFER as usize;
    let methods: Vec<_> = Method::ALL.iter().map(|(_, method)| *method).collect();
    let flags = (1..16_u8).prop_map(|bits| EventKinds {
        new: bits & 1 != 0,
        update: bits & 2 != 0,
        destroy: bits & 4 != 0,
        expect: bits & 8 != 0,
    });
    (flags, select(methods), any::<bool>(), sizes, any::<bool>()).prop_map(
        |(events, method, reliable, receive_buffer, enable_tracking)| CaptureSettings {
            events,
            method,
            reliable,
            receive_buffer,
            enable_tracking,
        },
    )
}

fn any_file(path: PathBuf) -> impl Strategy<Value = SinkTarget> {
    let sizes = MIN_ROTATE_SIZE..=MAX_ROTATE_SIZE;
    let times = 1_000..=366 * 86_400_000_u64;
    let compressions: Vec<_> = Compress::ALL.to_vec();
    let keep = option::of(1..=MAX_KEEP as usize);
    (option::of(sizes), option::of(times), keep, select(compressions)).prop_map(
        move |(rotate_size, millis, keep, compress)| {
            SinkTarget::File(FileConfig {
                path: path.clone(),
                rotate_size,
                rotate_every: millis.map(Duration::from_millis),
                keep,
                compress,
            })
        },
    )
}

/// Sink number `index`: the first may have stdout. The number keeps names and paths apart.
fn any_sink(index: usize) -> impl Strategy<Value = SinkSettings> {
    let fields = prop_oneof![
        Just(FieldChoice::Full),
        Just(FieldChoice::Audit),
        Just(FieldChoice::Accounting),
        Just(FieldChoice::List(vec!["src_ip".to_owned(), "ts".to_owned()])),
    ];
    let target = ("[^/\0]{1,12}", any::<bool>()).prop_flat_map(move |(file, stdout)| {
        let file = any_file(PathBuf::from(format!("/x{index}/{file}")));
        if stdout && index == 0 { Just(SinkTarget::Stdout).boxed() } else { file.boxed() }
    });
    ("[a-zA-Z0-9_.-]{1,20}", select(FormatKind::ALL), fields, target).prop_map(
        move |(name, format, fields, target)| {
            let fields =
                if format == FormatKind::Conntrack { FieldChoice::default() } else { fields };
            SinkSettings { name: format!("{name}{index}"), format, fields, target }
        },
    )
}

fn any_config() -> impl Strategy<Value = Config> {
    let spool = (MIN_SPOOL_SIZE..=MAX_SPOOL_SIZE, select(WhenFull::ALL))
        .prop_map(|(max_size, when_full)| SpoolConfig { max_size: max_size as usize, when_full });
    let levels: Vec<_> = LogLevel::ALL.iter().map(|(_, level)| *level).collect();
    let formats: Vec<_> = LogFormat::ALL.iter().map(|(_, format)| *format).collect();
    let telemetry = (select(levels), select(formats))
        .prop_map(|(log, log_format)| TelemetrySettings { log, log_format });
    let sinks = (1..4_usize).prop_flat_map(|count| (0..count).map(any_sink).collect::<Vec<_>>());
    let name = "[^\\p{Cc}]{1,20}";
    (name, any_capture(), any_filter(), any::<bool>(), spool, sinks, telemetry).prop_map(
        |(agent_name, capture, filter, snapshot, spool, sinks, telemetry)| Config {
            agent_name,
            capture,
            filter,
            snapshot,
            spool,
            sinks,
            telemetry,
        },
    )
}

/// Changes one letter of a key.
fn misspell(key: &str, at: usize, letter: char, way: u8) -> String {
    let mut letters: Vec<char> = key.chars().collect();
    let at = at % letters.len();
    match way % 3 {
        0 => letters.insert(at, letter),
        1 => letters[at] = letter,
        _ => letters.swap(at, (at + 1) % key.len()),
    }
    letters.into_iter().collect()
}

proptest! {
    #[test]
    fn random_text_never_panics(text in ".{0,200}") {
        if let Err(error) = Config::from_str(&text, "random") {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn text_that_is_nearly_toml_never_panics(
        text in r#"((\[{1,2}(sink|filter|capture|spool|x)\]{0,2}|(type|name|path|ports|marks|networks|keep|max_size|events) ?=? ?("?[a-z0-9!/:.-]{0,8}"?|\[.{0,6}\]?|[0-9]{1,22}|true))\r?\n?){0,12}"#
    ) {
        if let Err(error) = Config::from_str(&text, "random") {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn a_written_configuration_is_read_back_equal(config in any_config()) {
        let text = config.describe();
        prop_assert_eq!(Config::from_str(&text, "written").map_err(|e| e.to_string()), Ok(config));
    }

    #[test]
    fn a_typo_in_any_key_is_found_in_its_line(
        config in any_config(),
        line in any::<Index>(),
        at in any::<usize>(),
        letter in prop::char::range('a', 'z'),
        way in any::<u8>(),
    ) {
        let text = config.describe();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let with_key: Vec<_> = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.contains(" = "))
            .map(|(index, _)| index)
            .collect();
        let index = with_key[line.index(with_key.len())];
        let (key, value) = lines[index].split_once(" = ").expect("the line was chosen for it");
        let wrong = misspell(key, at, letter, way);
        prop_assume!(wrong != key);
        lines[index] = format!("{wrong} = {value}");
        let error = Config::from_str(&lines.join("\n"), "typo").expect_err("the key is unknown");
        let found = error.problems().iter().any(|problem| {
            problem.line == index + 1 && problem.message.starts_with("unknown key")
        });
        prop_assert!(found, "{}", error);
    }
}
