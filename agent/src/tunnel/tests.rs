//! The whole process, between network namespaces. Needs root, as the tunnel does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, unshare};
use proptest::{prelude::*, test_runner::TestRunner};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UdpSocket, UnixStream},
    runtime::Runtime,
    sync::oneshot,
    task::JoinHandle,
};

use super::{client::Client, *};
use crate::{
    kernel::{WgDevice, WireGuard},
    keys::{PresharedKey, PublicKey},
    names::Ordinal,
    state::Peer,
};

const WG0: names::Device = names::Device(Ordinal::ZERO);
const PORT: u16 = 27473;

/// A network namespace: whatever runs on its runtime is in it. With a run directory of its own.
struct Node {
    runtime: Runtime,
    options: TunnelOptions,
    key: PrivateKey,
    tunnel: Option<Serving>,
}

/// Dropping the sender ends it.
type Serving = (oneshot::Sender<()>, JoinHandle<Result<(), TunnelError>>);

impl Node {
    fn new(key: u8) -> Node {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("carrick-tunnel-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        // The runtime's threads are made by this one, and are where it is.
        let runtime = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            runtime(Some(2)).unwrap()
        });
        let options = TunnelOptions { run_dir: dir.clone(), uapi_dir: dir.join("wireguard") };
        let node = Node { runtime: runtime.join().unwrap(), options, key: PrivateKey::new([key; 32]), tunnel: None };
        node.ip("link set lo up");
        node
    }

    fn with_tunnel(key: u8) -> Node {
        let mut node = Node::new(key);
        node.start();
        node
    }

    /// Runs on a thread of the node's own.
    fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        self.runtime.block_on(self.runtime.spawn(work)).unwrap()
    }

    fn try_ip(&self, args: &str) -> Result<String, String> {
        let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
        let out = self.run(async move { Command::new("ip").args(args).output().unwrap() });
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    }

    fn ip(&self, args: &str) -> String {
        self.try_ip(args).unwrap_or_else(|err| panic!("ip {args}: {err}"))
    }

    fn start(&mut self) {
        let (stop, stopped) = oneshot::channel::<()>();
        let options = self.options.clone();
        let task = self.runtime.spawn(serve(options, async { drop(stopped.await) }));
        self.tunnel = Some((stop, task));
        let mut watch = self.client().watch();
        self.run(async move { watch.changed().await });
    }

    fn stop(&mut self) {
        let (stop, task) = self.tunnel.take().unwrap();
        drop(stop);
        self.runtime.block_on(task).unwrap().unwrap();
    }

    fn client(&self) -> Client {
        Client::new(&self.options.run_dir)
    }

    fn with_client<T>(&self, call: impl AsyncFnOnce(&mut Client) -> io::Result<T>) -> io::Result<T> {
        self.runtime.block_on(async { call(&mut self.client()).await })
    }

    fn read(&self) -> BTreeMap<names::Device, WgDevice> {
        self.with_client(async |client| client.read().await).unwrap()
    }

    fn public(&self) -> PublicKey {
        self.key.public()
    }

    /// The device, up, with an address, as the agent would have it.
    fn device_up(&self, address: &str) {
        self.with_client(async |client| client.set_device(WG0, PORT, &self.key).await).unwrap();
        self.ip("link set carrick-wg0 addrgenmode none");
        self.ip("link set carrick-wg0 mtu 1420 up");
        self.ip(&format!("addr replace {address} dev carrick-wg0"));
    }

    fn peer(&self, other: &Node, endpoint: Option<&str>, prefixes: &[&str]) {
        let gained: Vec<IpNetwork> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
        let peer = Peer { endpoint: endpoint.map(|at| at.parse().unwrap()), keepalive: 0, psk: None };
        let key = other.public();
        self.with_client(async |client| client.set_peer(WG0, &key, &peer, None, &gained).await).unwrap();
    }

    /// A cable to another node, with an address at either end.
    fn cable(&self, name: &str, address: &str, other: &Node, other_address: &str) {
        let thread = other.run(async { nix::unistd::gettid() });
        self.ip(&format!("link add {name} type veth peer name {name} netns {thread}"));
        for (node, address) in [(self, address), (other, other_address)] {
            node.ip(&format!("addr add {address} dev {name}"));
            node.ip(&format!("link set {name} up"));
        }
    }

    /// Collects the numbers that arrive at the address until `until` is among them.
    fn sink(&self, address: &str) -> (JoinHandle<()>, std::sync::mpsc::Receiver<u32>) {
        let address: SocketAddr = address.parse().unwrap();
        let socket = self.run(async move { UdpSocket::bind(address).await.unwrap() });
        let (tx, rx) = std::sync::mpsc::channel();
        let task = self.runtime.spawn(async move {
            let mut number = [0; 4];
            while socket.recv(&mut number).await.is_ok() && tx.send(u32::from_be_bytes(number)).is_ok() {}
        });
        (task, rx)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.tunnel.take());
        drop(std::fs::remove_dir_all(&self.options.run_dir));
    }
}

/// Long enough that only what never comes is missed.
const PATIENCE: Duration = Duration::from_secs(20);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() / 20 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("never: {what}");
}

/// Two nodes with a device each and one peer, the other. The second learns where the first is.
fn pair() -> (Node, Node) {
    let (a, b) = (Node::with_tunnel(1), Node::with_tunnel(2));
    a.cable("net", "192.0.2.1/24", &b, "192.0.2.2/24");
    b.device_up("10.77.0.2/24");
    b.peer(&a, None, &["10.77.0.1/32"]);
    a.device_up("10.77.0.1/24");
    a.peer(&b, Some("192.0.2.2:27473"), &["10.77.0.2/32"]);
    (a, b)
}

/// Waits for that datagram; earlier answers may come twice.
async fn hear(socket: &UdpSocket, expected: &[u8]) {
    let mut got = [0; 2048];
    while socket.recv(&mut got).await.is_ok_and(|len| got[..len] != *expected) {}
}

/// Asks until answered: 100 packets of 1400 bytes, then one byte.
fn talk(a: &Node, b: &Node, at: &str) {
    let address: SocketAddr = at.parse().unwrap();
    let echo = b.run(async move { UdpSocket::bind(address).await.unwrap() });
    let echo = b.runtime.spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = echo.recv_from(&mut buffer).await {
            echo.send_to(&buffer[..len], from).await.unwrap();
        }
    });
    let asked = a.run(async move {
        let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        let mut answers = 0;
        for (number, len) in (0u8..).zip([1400; 100].into_iter().chain([1])) {
            let question = vec![number; len];
            for _ in 0..PATIENCE.as_millis() / 200 {
                socket.send_to(&question, address).await.unwrap();
                let answered = tokio::time::timeout(Duration::from_millis(200), hear(&socket, &question)).await;
                if answered.is_ok() {
                    answers += 1;
                    break;
                }
            }
        }
        answers
    });
    echo.abort();
    // Until it has let go of the port.
    assert!(b.runtime.block_on(echo).unwrap_err().is_cancelled());
    assert_eq!(asked, 101);
}

#[test]
fn two_tunnels_talk_and_read_says_so() {
    let (a, b) = pair();
    talk(&a, &b, "10.77.0.2:7");
    let (at_a, at_b) = (&a.read()[&WG0], &b.read()[&WG0]);
    assert_eq!((at_a.key, at_a.port), (a.public(), PORT));
    assert_eq!(at_a.peers.keys().collect::<Vec<_>>(), [&b.public()]);
    let (b_at_a, a_at_b) = (&at_a.peers[&b.public()], &at_b.peers[&a.public()]);
    assert_eq!(b_at_a.allowed_ips, BTreeSet::from(["10.77.0.2/32".parse().unwrap()]));
    assert_eq!(a_at_b.peer.endpoint, Some("192.0.2.1:27473".parse().unwrap()), "learnt");
    for peer in [b_at_a, a_at_b] {
        assert!(peer.pair.rx_bytes > 100 * 1400 && peer.pair.tx_bytes > 100 * 1400, "{peer:?}");
        assert!(peer.pair.last_handshake.unwrap().elapsed().unwrap() < Duration::from_secs(180), "{peer:?}");
    }
    // A learnt endpoint stays when the plan has none; so does the session.
    b.peer(&a, None, &[]);
    assert_eq!(b.read()[&WG0].peers[&a.public()].peer.endpoint, a_at_b.peer.endpoint);
    assert_eq!(b.read()[&WG0].peers[&a.public()].pair.last_handshake, a_at_b.pair.last_handshake);
    talk(&a, &b, "10.77.0.2:7");
}

/// An answer from another address would move the endpoint, and would not pass a NAT.
#[test]
fn a_node_answers_from_the_address_that_it_was_reached_at() {
    let (a, b) = pair();
    a.ip("addr add 192.0.2.9/24 dev net");
    a.ip("addr add 2001:db8::1/64 dev net nodad");
    a.ip("addr add 2001:db8::9/64 dev net nodad preferred_lft 0");
    b.ip("addr add 2001:db8::2/64 dev net nodad");
    let endpoint_at_b = || b.read()[&WG0].peers[&a.public()].peer.endpoint.unwrap().to_string();
    for endpoint in ["192.0.2.9:27473", "[2001:db8::9]:27473"] {
        b.peer(&a, Some(endpoint), &[]);
        talk(&b, &a, "10.77.0.1:7");
        assert_eq!(endpoint_at_b(), endpoint);
    }
    // With the address gone, the tunnel goes on from another one.
    a.ip("addr del 2001:db8::9/64 dev net");
    talk(&a, &b, "10.77.0.2:7");
    assert_eq!(endpoint_at_b(), "[2001:db8::1]:27473");
}

#[test]
fn ipv6_inside_and_outside() {
    let (a, b) = (Node::with_tunnel(1), Node::with_tunnel(2));
    a.cable("net", "2001:db8::1/64", &b, "2001:db8::2/64");
    // Duplicate address detection holds a new address back for a second.
    for (node, address) in [(&a, "2001:db8::1/64"), (&b, "2001:db8::2/64")] {
        node.ip(&format!("addr change {address} dev net nodad"));
    }
    b.device_up("fd00::2/64");
    b.peer(&a, None, &["fd00::1/128"]);
    a.device_up("fd00::1/64");
    a.peer(&b, Some("[2001:db8::2]:27473"), &["fd00::/64"]);
    let key = b.public();
    eventually("handshake over IPv6", || {
        a.run(async {
            let socket = UdpSocket::bind("[::]:0").await.unwrap();
            drop(socket.send_to(b"?", "[fd00::2]:9").await);
        });
        a.read()[&WG0].peers[&key].pair.rx_bytes > 0
    });
}

#[test]
fn preshared_keys_must_match_and_are_read_as_ids() {
    let (a, b) = pair();
    let (right, wrong) = (PresharedKey::new([9; 32]), PresharedKey::new([8; 32]));
    let set = |node: &Node, other: &Node, psk: &PresharedKey| {
        let (key, peer) = (other.public(), Peer { endpoint: None, keepalive: 0, psk: Some(psk.id()) });
        node.with_client(async |client| client.set_peer(WG0, &key, &peer, Some(psk), &[]).await).unwrap();
    };
    set(&a, &b, &right);
    set(&b, &a, &right);
    talk(&a, &b, "10.77.0.2:7");
    assert_eq!(a.read()[&WG0].peers[&b.public()].peer.psk, Some(right.id()));

    let mismatch = Peer { endpoint: None, keepalive: 0, psk: Some(right.id()) };
    let key = b.public();
    let refused = a.with_client(async |client| client.set_peer(WG0, &key, &mismatch, Some(&wrong), &[]).await);
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_prefix_moves_and_peers_come_and_go_without_a_lost_packet() {
    let (a, b) = pair();
    let c = Node::with_tunnel(3);
    a.cable("net2", "198.51.100.1/24", &c, "198.51.100.2/24");
    c.device_up("10.77.0.3/24");
    c.peer(&a, None, &["10.77.0.1/32"]);
    a.peer(&c, Some("198.51.100.2:27473"), &["10.77.0.3/32"]);
    talk(&a, &b, "10.77.0.2:7");
    talk(&a, &c, "10.77.0.3:7");
    for node in [&b, &c] {
        node.ip("addr add 10.77.9.9/32 dev lo");
    }
    a.ip("route add 10.77.9.9/32 dev carrick-wg0");
    a.peer(&b, None, &["10.77.9.9/32"]);
    let (_, at_b) = b.sink("10.77.9.9:9");
    let (_, at_c) = c.sink("10.77.9.9:9");

    const COUNT: u32 = 4000;
    let sender = a.runtime.spawn(async {
        let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        for number in 0..COUNT {
            socket.send_to(&number.to_be_bytes(), "10.77.9.9:9").await.unwrap();
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    });
    let stranger = Node::new(4);
    for round in 0..10 {
        let (to, other) = if round % 2 == 0 { (&c, &b) } else { (&b, &c) };
        a.peer(&stranger, Some("192.0.2.77:1"), &["10.88.0.0/16", "10.77.9.8/32"]);
        a.peer(to, None, &["10.77.9.9/32", "10.77.9.8/32"]);
        let (key, gone) = (other.public(), stranger.public());
        // Not its own any more, so it is not taken from the new owner.
        a.with_client(async |client| client.drop_allowed_ips(WG0, &key, &["10.77.9.9/32".parse().unwrap()]).await)
            .unwrap();
        a.with_client(async |client| client.remove_peer(WG0, &gone).await).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    a.runtime.block_on(sender).unwrap();

    let mut seen = Vec::new();
    eventually("every number arrived", || {
        seen.extend(at_b.try_iter().chain(at_c.try_iter()));
        seen.len() as u32 >= COUNT
    });
    seen.sort_unstable();
    assert_eq!(seen, (0..COUNT).collect::<Vec<_>>(), "each once");
}

#[test]
fn a_deleted_link_is_noticed_and_made_again() {
    let (a, b) = pair();
    talk(&a, &b, "10.77.0.2:7");
    a.ip("link del carrick-wg0");
    eventually("the tunnel lets go of the device", || !a.read().contains_key(&WG0));
    let key = b.public();
    let peer = Peer { endpoint: None, keepalive: 0, psk: None };
    let refused = a.with_client(async |client| client.set_peer(WG0, &key, &peer, None, &[]).await).unwrap_err();
    assert_eq!(
        (refused.kind(), refused.to_string()),
        (io::ErrorKind::NotFound, "the tunnel holds no device carrick-wg0".to_owned())
    );
    a.device_up("10.77.0.1/24");
    a.peer(&b, Some("192.0.2.2:27473"), &["10.77.0.2/32"]);
    talk(&a, &b, "10.77.0.2:7");
}

#[test]
fn a_restarted_tunnel_takes_over_its_link_as_it_is() {
    let (mut a, b) = pair();
    talk(&a, &b, "10.77.0.2:7");
    let mut watch = a.client().watch();
    let mut changed = |node: &Node| {
        node.runtime.block_on(async {
            watch.changed().await;
            watch.is_up()
        })
    };
    assert!(changed(&a), "the tunnel is there");
    // Index, flags and MTU; what follows is the kernel's.
    let link = |node: &Node| node.ip("-o link show carrick-wg0").split(" qdisc").next().map(str::to_owned);
    let before = link(&a);
    a.stop();
    assert!(!changed(&a), "the tunnel is gone");
    assert!(!a.options.run_dir.join(SOCKET).exists() && !a.options.uapi_dir.join("carrick-wg0.sock").exists());
    let refused = a.with_client(async |client| client.read().await).unwrap_err().to_string();
    let socket = a.options.run_dir.join(SOCKET);
    assert_eq!(refused, format!("tunnel at {}: `carrick tunnel` does not run", socket.display()));

    a.start();
    assert!(changed(&a), "the tunnel is back");
    assert_eq!(a.read(), BTreeMap::new());
    a.with_client(async |client| client.set_device(WG0, PORT, &a.key).await).unwrap();
    assert_eq!(link(&a), before);
    a.peer(&b, Some("192.0.2.2:27473"), &["10.77.0.2/32"]);
    talk(&a, &b, "10.77.0.2:7");

    a.with_client(async |client| client.del_device(WG0).await).unwrap();
    a.try_ip("link show carrick-wg0").unwrap_err();
    a.with_client(async |client| client.del_device(WG0).await).unwrap();
}

#[test]
fn a_new_link_is_down_and_bare() {
    let a = Node::with_tunnel(1);
    a.with_client(async |client| client.set_device(WG0, PORT, &a.key).await).unwrap();
    let link = a.ip("-o link show carrick-wg0");
    assert!(!link.contains("UP") && link.contains("qlen 4096"), "{link}");
    assert_eq!(a.ip("-o addr show dev carrick-wg0"), "");
    // One socket, bound at once, for both families.
    let taken = a.run(async { UdpSocket::bind(("0.0.0.0", PORT)).await.map(drop) }).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn port_and_key_change_in_place() {
    let (a, b) = pair();
    talk(&a, &b, "10.77.0.2:7");
    let before = a.read()[&WG0].peers[&b.public()].pair.last_handshake;
    a.with_client(async |client| client.set_device(WG0, PORT + 1, &a.key).await).unwrap();
    talk(&a, &b, "10.77.0.2:7");
    assert_eq!(a.read()[&WG0].peers[&b.public()].pair.last_handshake, before, "the session went on");
    assert_eq!(b.read()[&WG0].peers[&a.public()].peer.endpoint, Some("192.0.2.1:27474".parse().unwrap()), "roamed");

    let other = PrivateKey::new([5; 32]);
    let peer = Peer { endpoint: None, keepalive: 0, psk: None };
    b.with_client(async |client| {
        client.set_peer(WG0, &other.public(), &peer, None, &["10.77.0.1/32".parse().unwrap()]).await
    })
    .unwrap();
    a.with_client(async |client| client.set_device(WG0, PORT + 1, &other).await).unwrap();
    talk(&a, &b, "10.77.0.2:7");

    let taken = a.run(async { UdpSocket::bind(("0.0.0.0", 9999)).await.unwrap() });
    let refused = a.with_client(async |client| client.set_device(WG0, 9999, &other).await).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    assert!(refused.to_string().contains("UDP port 9999"), "{refused}");
    drop(taken);
    talk(&a, &b, "10.77.0.2:7");
}

#[test]
fn a_second_tunnel_says_who_holds_the_lock() {
    let a = Node::with_tunnel(1);
    let options = a.options.clone();
    let refused = a.run(serve(options, std::future::pending())).unwrap_err();
    let lock = a.options.run_dir.join("tunnel.lock");
    let expected = format!("{} is held by process {}: only one", lock.display(), std::process::id());
    assert!(refused.to_string().starts_with(&expected), "{refused}");
    a.read();
}

#[test]
fn bad_requests_are_answered_and_stop_nothing() {
    let a = Node::with_tunnel(1);
    let socket = a.options.run_dir.join(SOCKET);
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!((mode & 0o777, std::fs::metadata(&socket).unwrap().file_type().is_socket()), (0o600, true));
    a.runtime.block_on(async {
        // Whoever does not greet is let go.
        let mut stranger = UnixStream::connect(&socket).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut heard = Vec::new();
        drop(stranger.read_to_end(&mut heard).await);
        assert_eq!(heard, proto::greeting(&proto::VERSIONS));

        let mut stream = UnixStream::connect(&socket).await.unwrap();
        proto::greet(&mut stream).await.unwrap();
        let too_long = vec![0; proto::MAX_REQUEST + 1];
        let own_key = Request::SetPeer {
            device: WG0,
            key: a.public(),
            peer: proto::PeerConfig { endpoint: None, keepalive: 0, psk: None },
            gained: Vec::new(),
        };
        let set_device = Request::SetDevice { device: WG0, port: PORT, key: a.key.clone() };
        for (body, expected) in [
            (&b""[..], "malformed request: empty"),
            (b"\xff", "malformed request: of no known kind"),
            (b"\x00\x00", "malformed frame: bytes left over"),
            (b"\x05\x08", "malformed device: above 7"),
            (&too_long, "the request is too long"),
            (&own_key.encode(), "the tunnel holds no device carrick-wg0"),
            (&set_device.encode(), ""),
            (&own_key.encode(), &format!("peer {} has carrick-wg0's own key", a.public())),
        ] {
            proto::write_frame(&mut stream, body).await.unwrap();
            let Frame::Body(answer) = proto::read_frame(&mut stream, proto::MAX_ANSWER).await.unwrap() else {
                panic!("no answer to {expected}");
            };
            let message = match Answer::decode(&answer).unwrap() {
                Answer::Refused { message, .. } => message,
                _ => String::new(),
            };
            assert_eq!(message, expected);
        }
        // Cut off in the middle of a frame.
        stream.write_all(&[0, 0, 0, 9, 1]).await.unwrap();
    });
    a.read();
}

#[test]
fn a_tunnel_that_hangs_is_an_error_that_names_the_socket() {
    let a = Node::new(1);
    std::fs::create_dir_all(&a.options.run_dir).unwrap();
    let socket = a.options.run_dir.join(SOCKET);
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let refused = a.with_client(async |client| {
        client.set_timeout(Duration::from_millis(50));
        client.read().await
    });
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
    assert!(refused.to_string().starts_with(&format!("tunnel at {}: no answer", socket.display())), "{refused}");
}

#[test]
fn wg_show_reads_and_cannot_write() {
    let a = Node::with_tunnel(1);
    let b = Node::new(2);
    a.with_client(async |client| client.set_device(WG0, PORT, &a.key).await).unwrap();
    a.peer(&b, Some("192.0.2.2:27473"), &["10.77.0.2/32", "fd00::/64"]);
    let ask = |request: &'static [u8]| {
        let path = a.options.uapi_dir.join("carrick-wg0.sock");
        a.runtime.block_on(async move {
            let mut stream = UnixStream::connect(path).await.unwrap();
            stream.write_all(request).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        })
    };
    let hex = |bytes: &[u8; 32]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let expected = format!(
        "private_key={}\nlisten_port=27473\npublic_key={}\nendpoint=192.0.2.2:27473\nrx_bytes=0\ntx_bytes=0\n\
         persistent_keepalive_interval=0\nallowed_ip=10.77.0.2/32\nallowed_ip=fd00::/64\nprotocol_version=1\nerrno=0\n\n",
        hex(a.key.as_bytes()),
        hex(b.public().as_bytes()),
    );
    assert_eq!(ask(b"get=1\n\n"), expected);
    assert_eq!(ask(b"set=1\nreplace_peers=true\n\n"), "errno=95\n\n");
    assert_eq!(ask(b"hello\n\nget=1\n\n"), format!("errno=71\n\n{expected}"));
    let mode = std::fs::metadata(a.options.uapi_dir.join("carrick-wg0.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[derive(Clone, Debug)]
enum Change {
    Set(u8, Vec<u8>),
    Drop(u8, Vec<u8>),
    Remove(u8),
}

/// The kernel's semantics, naively: a prefix has one owner, whoever got it last.
#[test]
fn prefixes_are_owned_as_in_the_kernel() {
    let a = Node::with_tunnel(1);
    a.with_client(async |client| client.set_device(WG0, PORT, &a.key).await).unwrap();
    let peers: Vec<PublicKey> = (10..14).map(|n| PrivateKey::new([n; 32]).public()).collect();
    let prefixes: Vec<IpNetwork> = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "::/0", "fd00::/8", "fd00::/64"]
        .map(|prefix| prefix.parse().unwrap())
        .to_vec();
    let some = || prop::collection::vec(0u8..6, 0..4);
    let change = prop_oneof![
        4 => (0u8..4, some()).prop_map(|(peer, nets)| Change::Set(peer, nets)),
        2 => (0u8..4, some()).prop_map(|(peer, nets)| Change::Drop(peer, nets)),
        1 => (0u8..4).prop_map(Change::Remove),
    ];
    let config = Peer { endpoint: None, keepalive: 0, psk: None };
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() });
    let law = runner.run(&prop::collection::vec(change, 1..24), |changes| {
        let mut owners: BTreeMap<IpNetwork, PublicKey> = BTreeMap::new();
        let mut there: BTreeSet<PublicKey> = BTreeSet::new();
        a.with_client(async |client| {
            for key in &peers {
                client.remove_peer(WG0, key).await?;
            }
            for change in &changes {
                let nets = |numbers: &[u8]| numbers.iter().map(|n| prefixes[usize::from(*n)]).collect::<Vec<_>>();
                match change {
                    Change::Set(peer, gained) => {
                        let key = peers[usize::from(*peer)];
                        client.set_peer(WG0, &key, &config, None, &nets(gained)).await?;
                        there.insert(key);
                        owners.extend(nets(gained).into_iter().map(|net| (net, key)));
                    }
                    Change::Drop(peer, lost) => {
                        let (key, lost) = (peers[usize::from(*peer)], nets(lost));
                        client.drop_allowed_ips(WG0, &key, &lost).await?;
                        owners.retain(|net, owner| *owner != key || !lost.contains(net));
                    }
                    Change::Remove(peer) => {
                        let key = peers[usize::from(*peer)];
                        client.remove_peer(WG0, &key).await?;
                        there.remove(&key);
                        owners.retain(|_, owner| *owner != key);
                    }
                }
            }
            Ok(())
        })
        .unwrap();
        let read = &a.read()[&WG0].peers;
        let pairs = read.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|net| (*net, *key)));
        prop_assert_eq!(pairs.collect::<BTreeMap<_, _>>(), owners);
        prop_assert_eq!(read.keys().copied().collect::<BTreeSet<_>>(), there);
        Ok(())
    });
    law.unwrap();
}

#[test]
fn the_machine_must_have_a_tun() {
    let missing = PathBuf::from("/nonexistent/tun");
    assert!(
        tun::check_node(&missing)
            .unwrap_err()
            .to_string()
            .starts_with("/nonexistent/tun does not exist: load the module")
    );
    assert!(tun::check_node(Path::new("/etc/passwd")).unwrap_err().to_string().contains("no character device"));
    assert!(tun::check_node(Path::new(TUN_NODE)).is_ok());
}
