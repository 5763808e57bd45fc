//! `[filter]`: each condition ships exactly the flows that the plan says, whether the kernel or the
//! agent filters.

use std::net::IpAddr;

use super::{
    Counters, TO_FILE, can_run, check_shape, close_gateway, end_well, has_lines, of_event, start,
    wait_until,
};
use crate::lab::agent::AgentProcess;
use crate::lab::demo;
use crate::lab::gateway::Gateway;
use crate::lab::limit::HostLimit;
use crate::lab::records;
use crate::lab::traffic::{Addresses, GRE, Planned};

const FLOWS: usize = 600;
const MARK: u32 = 0x2a;
const ZONE: u16 = 7;

/// A filter and, said in another way, which flows it lets pass.
struct Case {
    filter: &'static str,
    passes: fn(&Planned) -> bool,
    /// The kernel can do some of it.
    in_kernel: bool,
}

const CASES: &[Case] = &[
    Case { filter: "", passes: |_| true, in_kernel: false },
    Case { filter: "nat_only = true", passes: |flow| flow.nat().is_some(), in_kernel: false },
    Case {
        filter: "protocols = [\"udp\", \"icmp\", 47]",
        passes: |flow| matches!(flow.proto, 17 | 1 | 47),
        in_kernel: true,
    },
    Case {
        // Before or after the translation: the client and the forwarding address.
        filter: "networks = [\"203.0.113.4/32\", \"fd77:9::/64\"]",
        passes: |flow| ends(flow).any(|ip| ip == v4(4) || ip == Addresses::of(true).virtual_server),
        in_kernel: true,
    },
    Case {
        filter: "networks = [\"0.0.0.0/0\", \"!203.0.113.3/32\", \"!198.18.0.0/15\"]",
        passes: |flow| {
            !flow.ipv6()
                && ends(flow).all(|ip| ip != v4(3) && ip != Addresses::of(false).virtual_server)
        },
        in_kernel: true,
    },
    Case {
        filter: "ports = [53, \"10000-10049\"]",
        passes: |flow| ports(flow).any(|port| port == 53 || (10_000..10_050).contains(&port)),
        in_kernel: false,
    },
    Case { filter: "marks = [\"0x2a/0xff\"]", passes: is_marked, in_kernel: false },
    Case { filter: "marks = [0]", passes: |flow| !is_marked(flow), in_kernel: false },
    Case { filter: "zones = [7]", passes: is_zoned, in_kernel: false },
    Case {
        filter: "protocols = [\"tcp\"]\nnat_only = true\nnetworks = [\"fd77::/16\"]\nports = [80]",
        passes: |flow| {
            flow.proto == 6
                && flow.nat().is_some()
                && flow.ipv6()
                && ports(flow).any(|port| port == 80)
        },
        in_kernel: true,
    },
];

fn v4(host: u8) -> IpAddr {
    [203, 0, 113, host].into()
}

/// All addresses of a flow, before and after translation.
fn ends(flow: &Planned) -> impl Iterator<Item = IpAddr> {
    let translated = [flow.nat_src, flow.nat_dst].into_iter().flatten();
    [flow.src, flow.dst].into_iter().chain(translated).map(|end| end.ip)
}

/// All its ports; none of GRE and the like.
fn ports(flow: &Planned) -> impl Iterator<Item = u16> {
    let translated = [flow.nat_src, flow.nat_dst].into_iter().flatten();
    let all = [flow.src, flow.dst].into_iter().chain(translated).map(|end| end.port);
    let has_ports = flow.proto != GRE && flow.icmp.is_none();
    all.filter(move |port| has_ports && *port != 0)
}

/// As the rules below say.
fn is_marked(flow: &Planned) -> bool {
    flow.proto == 17 && flow.dst.port == 53
}

fn is_zoned(flow: &Planned) -> bool {
    flow.dst.ip == v4(3)
}

/// Both directions, so that an answer finds its flow. In the order of the hooks: a zone is given
/// before conntrack looks, a mark before addresses are translated.
fn rules() -> String {
    format!(
        "table inet conntrail_filters {{
            chain zones {{
                type filter hook prerouting priority raw; policy accept;
                ip daddr 203.0.113.3 ct zone set {ZONE}
                ip saddr 203.0.113.3 ct zone set {ZONE}
            }}
            chain marks {{
                type filter hook prerouting priority mangle; policy accept;
                ct state new udp dport 53 ct mark set {MARK}
            }}
            chain probes {{
                type filter hook output priority raw; policy accept;
                oif lo notrack
            }}
        }}"
    )
}

#[test]
fn each_filter_ships_the_same_flows_from_the_kernel_as_from_user_space() {
    if !can_run("filters", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(50_000).expect("the limit");
    let lab = Gateway::new().expect("a gateway");
    lab.gateway.nft(&rules()).expect("rules");
    // All on the same traffic, each case twice.
    let mut running: Vec<(&Case, AgentProcess)> = Vec::new();
    for case in CASES {
        running.push((case, start(&lab.gateway, &config(case))));
    }
    let without_kernel = start_without_kernel_filters(&lab);
    let flows = lab.mixed(FLOWS).expect("traffic");
    close_gateway(&lab);
    lab.flush().expect("a flush");

    let by_kernel: Vec<Counters> =
        running.into_iter().map(|(case, process)| check(case, process, &flows)).collect();
    let by_agent: Vec<Counters> =
        without_kernel.into_iter().map(|(case, process)| check(case, process, &flows)).collect();
    for ((case, by_kernel), by_agent) in CASES.iter().zip(by_kernel).zip(by_agent) {
        let received = |counters: &Counters| counters.sum("events_received_total");
        assert_eq!(received(&by_agent), 2 * FLOWS as u64, "{}: {by_agent:#?}", case.filter);
        assert_eq!(received(&by_kernel) < received(&by_agent), case.in_kernel, "{}", case.filter);
    }
}

fn config(case: &Case) -> String {
    format!("[filter]\n{}\n{TO_FILE}", case.filter)
}

/// The kernel takes a socket filter only within `net.core.optmem_max`.
fn start_without_kernel_filters(lab: &Gateway) -> Vec<(&'static Case, AgentProcess)> {
    let before = lab.gateway.read_sysctl("core/optmem_max").expect("a setting");
    lab.gateway.sysctl("core/optmem_max", "1").expect("a setting");
    let running: Vec<_> =
        CASES.iter().map(|case| (case, start(&lab.gateway, &config(case)))).collect();
    lab.gateway.sysctl("core/optmem_max", &before).expect("a setting");
    for (case, process) in &running {
        let log = process.stderr().expect("a log");
        assert_eq!(log.contains("filtering in user space alone"), case.in_kernel, "{log}");
    }
    running
}

fn check(case: &Case, mut process: AgentProcess, flows: &[Planned]) -> Counters {
    let wanted: Vec<Planned> = flows.iter().filter(|flow| (case.passes)(flow)).copied().collect();
    assert!(wanted.len() > 5, "{} tries nothing", case.filter);
    wait_until("all ends", || has_lines(&process, "\"event\":\"destroy\"", wanted.len()));
    let counters = end_well(&mut process);
    let records = records::read(&process.path("flows.json")).expect("whole lines");
    check_shape(&records);
    let faults = demo::compare(&wanted, &records);
    assert!(faults.is_empty(), "{}: {:#?}", case.filter, &faults[..faults.len().min(5)]);
    assert_eq!(records.len(), 2 + 2 * wanted.len(), "{}: and nothing else", case.filter);
    for flow in of_event(&records, "destroy") {
        let key = crate::lab::traffic::key_of(flow).expect("a flow");
        let planned = wanted.iter().find(|wanted| wanted.key() == key).expect("compared above");
        assert_eq!(flow.get("mark").is_some_and(|mark| mark == MARK), is_marked(planned), "{flow}");
        assert_eq!(flow.get("zone").is_some_and(|zone| zone == ZONE), is_zoned(planned), "{flow}");
    }
    counters.balance(2);
    let received = counters.sum("events_received_total");
    assert_eq!(received - counters.get("events_filtered_total"), 2 * wanted.len() as u64);
    counters
}
