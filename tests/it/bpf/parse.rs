//! The IP packet in a frame, as far as the model looks.

use ebpf::Addr;

use super::packet::{ETH, is_v4};

/// An IP packet whose headers are whole. Offsets are from the start of the IP header.
#[derive(Clone, Debug)]
pub struct Ip {
    pub v4: bool,
    pub src: Addr,
    pub dst: Addr,
    /// Or hop limit.
    pub ttl: u8,
    pub fragment: Fragment,
    /// Of what stands at `l4`, as every fragment knows it.
    pub protocol: u8,
    /// Where the IP header and its extensions end; what is behind a fragment header is not looked at.
    pub l4: usize,
    /// Where the packet ends by its own header; the frame may have more.
    pub end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    None,
    First,
    Later,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    NotIp,
    Truncated,
}

impl Ip {
    pub fn flow(&self) -> u32 {
        let words = |addr: Addr| {
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(addr.0.chunks(4)) {
                *word = u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
            }
            words
        };
        ebpf::flow(&words(self.src), &words(self.dst), self.protocol)
    }
}

/// `segmented`: the packet is one of segmentation offload, whose length may be beyond what its header can say: 0.
pub fn parse(frame: &[u8], segmented: bool) -> Result<Ip, Malformed> {
    let l3 = &frame[ETH..];
    match [frame[12], frame[13]] {
        [0x08, 0x00] => v4(l3, segmented),
        [0x86, 0xdd] => v6(l3, segmented),
        _ => Err(Malformed::NotIp),
    }
}

fn v4(l3: &[u8], segmented: bool) -> Result<Ip, Malformed> {
    if l3.len() < 20 {
        return Err(Malformed::Truncated);
    }
    if l3[0] >> 4 != 4 {
        return Err(Malformed::NotIp);
    }
    let l4 = usize::from(l3[0] & 15) * 4;
    let end = match usize::from(u16::from_be_bytes([l3[2], l3[3]])) {
        0 if segmented => l3.len(),
        total => total,
    };
    if l4 < 20 || end < l4 || l3.len() < end {
        return Err(Malformed::Truncated);
    }
    let flags = u16::from_be_bytes([l3[6], l3[7]]);
    let fragment = match (flags & 0x1fff, flags & 0x2000) {
        (0, 0) => Fragment::None,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    let addr = |at: usize| Addr::v4([l3[at], l3[at + 1], l3[at + 2], l3[at + 3]]);
    Ok(Ip { v4: true, src: addr(12), dst: addr(16), ttl: l3[8], fragment, protocol: l3[9], l4, end })
}

fn v6(l3: &[u8], segmented: bool) -> Result<Ip, Malformed> {
    if l3.len() < 40 {
        return Err(Malformed::Truncated);
    }
    let addr = |at: usize| Addr(l3[at..at + 16].try_into().expect("sixteen bytes"));
    let (src, dst) = (addr(8), addr(24));
    // An IPv4 address in an IPv6 header would be another network's in the maps.
    if l3[0] >> 4 != 6 || is_v4(src) || is_v4(dst) {
        return Err(Malformed::NotIp);
    }
    let end = match usize::from(u16::from_be_bytes([l3[4], l3[5]])) {
        0 if segmented => l3.len(),
        payload => 40 + payload,
    };
    if l3.len() < end {
        return Err(Malformed::Truncated);
    }
    let (mut protocol, mut l4, mut fragment) = (l3[6], 40, Fragment::None);
    for _ in 0..ebpf::MAX_EXTENSIONS {
        if ![0, 43, 44, 60].contains(&protocol) {
            break;
        }
        let header = l3[..end].get(l4..l4 + 8).ok_or(Malformed::Truncated)?;
        let is_fragment = protocol == 44;
        protocol = header[0];
        l4 += if is_fragment { 8 } else { 8 + 8 * usize::from(header[1]) };
        if l4 > end {
            return Err(Malformed::Truncated);
        }
        if is_fragment {
            let place = u16::from_be_bytes([header[2], header[3]]);
            fragment = match (place >> 3, place & 1) {
                (0, 0) => Fragment::None,
                (0, _) => Fragment::First,
                _ => Fragment::Later,
            };
            break;
        }
    }
    Ok(Ip { v4: false, src, dst, ttl: l3[7], fragment, protocol, l4, end })
}
