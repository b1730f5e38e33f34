//! Arithmetic of prefixes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// The prefix of that length around an address; `None` if the length is too long for its family.
pub(super) fn around(address: IpAddr, length: u8) -> Option<IpNetwork> {
    let network = IpNetwork::new(address, length).ok()?;
    IpNetwork::new(network.network(), length).ok()
}

/// The prefixes that hold `inner`, from /0 to itself.
pub(super) fn enclosing(inner: IpNetwork) -> impl Iterator<Item = IpNetwork> {
    (0..=inner.prefix()).filter_map(move |length| around(inner.network(), length))
}

/// What is left of `part` without `taken`, of the same family: at most one prefix of each length between theirs.
pub(super) fn without(part: IpNetwork, taken: IpNetwork) -> Vec<IpNetwork> {
    let covers =
        |outer: IpNetwork, inner: IpNetwork| outer.prefix() <= inner.prefix() && outer.contains(inner.network());
    if covers(taken, part) {
        return Vec::new();
    }
    if !covers(part, taken) {
        return vec![part];
    }
    let (mut rest, mut around_taken) = (Vec::new(), part);
    while let Some((low, high)) = halves(around_taken).filter(|_| around_taken != taken) {
        let (inside, outside) = if covers(low, taken) { (low, high) } else { (high, low) };
        rest.push(outside);
        around_taken = inside;
    }
    rest
}

fn halves(whole: IpNetwork) -> Option<(IpNetwork, IpNetwork)> {
    let length = whole.prefix() + 1;
    let upper = match whole.network() {
        IpAddr::V4(address) => {
            IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() | 1_u32.checked_shl(32_u32.checked_sub(length.into())?)?))
        }
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(
            address.to_bits() | 1_u128.checked_shl(128_u32.checked_sub(length.into())?)?,
        )),
    };
    Some((IpNetwork::new(whole.network(), length).ok()?, IpNetwork::new(upper, length).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn check(part: &str, taken: &str, rest: &[&str]) {
        assert_eq!(without(net(part), net(taken)), rest.iter().map(|r| net(r)).collect::<Vec<_>>(), "{part} - {taken}");
    }

    #[test]
    fn taking_a_prefix_out_of_another_leaves_its_siblings() {
        check("10.0.0.0/8", "10.0.0.0/8", &[]);
        check("10.1.0.0/16", "10.0.0.0/8", &[]);
        check("10.1.0.0/16", "10.2.0.0/16", &["10.1.0.0/16"]);
        check("10.0.0.0/30", "10.0.0.2/32", &["10.0.0.0/31", "10.0.0.3/32"]);
        check("0.0.0.0/0", "192.0.0.0/2", &["0.0.0.0/1", "128.0.0.0/2"]);
        check("fd00::/64", "fd00:0:0:0:8000::/66", &["fd00::/65", "fd00:0:0:0:c000::/66"]);
    }
}
