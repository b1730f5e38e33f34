//! [`plan`] on machines as data.

use expect_test::{Expect, expect};

use super::*;

const DEBIAN_12: &str = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
const UBUNTU: &str = "PRETTY_NAME=\"Ubuntu 24.04.1 LTS\"\nVERSION_ID=\"24.04\"\nID=ubuntu\nID_LIKE=debian\n";
const FEDORA: &str = "PRETTY_NAME=\"Fedora Linux 42\"\nVERSION_ID=42\nID=fedora\n";

fn named(missing: &[&str]) -> Vec<&'static Need> {
    let needs: Vec<_> = NEEDS.iter().filter(|need| missing.contains(&describe(need.what).as_str())).collect();
    assert_eq!(needs.len(), missing.len(), "a name in the test that no need has");
    needs
}

fn check(os_release: &str, missing: &[&str], expected: Expect) {
    check_for(For::Test, !missing.contains(&"root"), os_release, missing, expected);
}

fn check_for(command: For, root: bool, os_release: &str, missing: &[&str], expected: Expect) {
    let text = match plan(command, &named(missing), root, &Os::parse(os_release)) {
        Plan::Ready => panic!("something is missing"),
        Plan::Install(actions) => actions.iter().map(|action| format!("{action:?}\n")).collect(),
        Plan::Refuse(message) => message,
    };
    expected.assert_eq(&text);
}

#[test]
fn nothing_missing_is_ready_anywhere() {
    for os in [DEBIAN_12, FEDORA, ""] {
        assert_eq!(plan(For::Demo, &[], false, &Os::parse(os)), Plan::Ready);
    }
}

#[test]
fn root_on_debian_12_installs_packages_first() {
    check(
        DEBIAN_12,
        &["cargo-deny", "wg", "rustup component clippy", "nft"],
        expect![[r#"
        Apt(["nftables", "wireguard-tools"])
        Rustup(["clippy"])
        Build(Crate { package: "cargo-deny", version: "0.20.2", binary: "cargo-deny" })
    "#]],
    );
}

#[test]
fn a_user_on_debian_12_is_told_once() {
    check(
        DEBIAN_12,
        &["root", "nft", "ip", "cargo-deny"],
        expect![[r#"
        missing on this machine:
          root                         makes network namespaces and TUN devices
          nft                          the agent's identity NAT; the lab's masquerading and NAT routers
          ip                           links, addresses and routes of the lab
          cargo-deny                   the licence check; xtask gets it itself, into its cache
        paste this line:
          sudo apt-get update && sudo apt-get install -y --no-install-recommends nftables iproute2 && sudo env "PATH=$PATH" "HOME=$HOME" cargo xtask test
        without root: cargo test -p agent
    "#]],
    );
}

#[test]
fn a_user_with_every_package_lacks_only_root() {
    check(
        DEBIAN_12,
        &["root"],
        expect![[r#"
        missing on this machine:
          root                         makes network namespaces and TUN devices
        paste this line:
          sudo env "PATH=$PATH" "HOME=$HOME" cargo xtask test
        without root: cargo test -p agent
    "#]],
    );
}

#[test]
fn a_user_may_build_the_image_but_install_nothing() {
    check_for(
        For::Image,
        false,
        DEBIAN_12,
        &["nft", "bpf-linker"],
        expect![[r#"
        missing on this machine:
          bpf-linker                   links the BPF programs; xtask gets it itself, into its cache
          nft                          the agent's identity NAT; the lab's masquerading and NAT routers
        paste this line:
          sudo apt-get update && sudo apt-get install -y --no-install-recommends nftables
    "#]],
    );
}

#[test]
fn elsewhere_root_installs_nothing_by_itself() {
    check(
        UBUNTU,
        &["wg"],
        expect![[r#"
        missing on this machine:
          wg                           shows our devices; configures the implementations we are measured against
        paste this line:
          apt-get update && apt-get install -y --no-install-recommends wireguard-tools
        only Debian 12 was tried, Ubuntu 24.04.1 LTS was not
    "#]],
    );
    check(
        FEDORA,
        &["/usr/include/stdio.h", "ip"],
        expect![[r#"
        missing on this machine:
          /usr/include/stdio.h         compiles and links ring, the cryptography
          ip                           links, addresses and routes of the lab
        paste this line:
          dnf install -y glibc-devel iproute
        only Debian 12 was tried, Fedora Linux 42 was not
    "#]],
    );
    check(
        "",
        &["nft"],
        expect![[r#"
        missing on this machine:
          nft                          the agent's identity NAT; the lab's masquerading and NAT routers
        paste this line:
          apt-get update && apt-get install -y --no-install-recommends nftables
        only Debian 12 was tried, this system was not
    "#]],
    );
}

#[test]
fn what_only_the_tests_run_is_got_too() {
    let programs = ["conntrack", "setpriv", "mount"];
    for need in named(&programs) {
        assert!(need.by.contains(&For::Test) && !need.by.contains(&For::Demo), "{need:?}");
    }
    check(
        DEBIAN_12,
        &programs,
        expect![[r#"
            Apt(["conntrack", "util-linux", "mount"])
        "#]],
    );
    check(
        FEDORA,
        &programs,
        expect![[r#"
            missing on this machine:
              conntrack                    shows the tracked connections, and has a NAT router forget one
              setpriv                      starts the agent without a capability that it needs
              mount                        starts the agent without /dev/net/tun
            paste this line:
              dnf install -y conntrack-tools util-linux
            only Debian 12 was tried, Fedora Linux 42 was not
        "#]],
    );
}

#[test]
fn elsewhere_the_cache_is_still_ours_to_fill() {
    check(
        FEDORA,
        &["rustup component rustfmt", "go >= 1.26", "wireguard-go"],
        expect![[r#"
            Rustup(["rustfmt"])
            FetchGo
            Build(Go(Go { name: "wireguard-go", module: "wireguard-go", package: "golang.zx2c4.com/wireguard", version: "20260522210424-ecfc5a8d5446", stamped: [], cgo: false }))
        "#]],
    );
}

#[test]
fn what_no_package_brings_is_named_with_its_remedy() {
    check(
        DEBIAN_12,
        &["/dev/net/tun", "nft"],
        expect![[r#"
        missing on this machine:
          /dev/net/tun                 userspace WireGuard devices
          nft                          the agent's identity NAT; the lab's masquerading and NAT routers
        paste this line:
          modprobe tun && apt-get update && apt-get install -y --no-install-recommends nftables
    "#]],
    );
    check(
        DEBIAN_12,
        &["namespaces"],
        expect![[r#"
        missing on this machine:
          namespaces                   nodes of the lab are namespaces
        making namespaces is forbidden here (a container?): it needs CAP_SYS_ADMIN and CAP_NET_ADMIN
    "#]],
    );
}

#[test]
fn the_bpf_programs_are_built_by_debians_compiler_and_our_linker() {
    let missing = ["rustc with rust-src", "LLVM 22", "bpf-linker"];
    check(
        DEBIAN_12,
        &missing,
        expect![[r#"
            Apt(["rustc-web", "rust-web-src", "llvm-22-dev"])
            Build(BpfLinker { version: "0.13.0" })
        "#]],
    );
    check(
        FEDORA,
        &missing,
        expect![[r#"
        missing on this machine:
          rustc with rust-src          compiles the BPF programs: a rustc with the source of core (rust-src)
          LLVM 22                      bpf-linker is linked to it
          bpf-linker                   links the BPF programs; xtask gets it itself, into its cache
        paste this line:
          dnf install -y rust rust-src llvm22-devel
        only Debian 12 was tried, Fedora Linux 42 was not
    "#]],
    );
}

#[test]
fn go_comes_from_pypi_with_what_that_needs() {
    check(
        DEBIAN_12,
        &["go >= 1.26, or python3 venv", "go >= 1.26", "wireguard-go"],
        expect![[r#"
            Apt(["python3-venv"])
            FetchGo
            Build(Go(Go { name: "wireguard-go", module: "wireguard-go", package: "golang.zx2c4.com/wireguard", version: "20260522210424-ecfc5a8d5446", stamped: [], cgo: false }))
        "#]],
    );
}

#[test]
fn every_command_needs_root_and_the_table_has_no_twins() {
    for command in [For::Demo, For::Test, For::Lab, For::Bench, For::Control] {
        assert!(NEEDS.iter().any(|need| need.what == What::Root && need.by.contains(&command)));
    }
    let mut names: Vec<_> = NEEDS.iter().map(|need| describe(need.what)).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), NEEDS.len());
}
