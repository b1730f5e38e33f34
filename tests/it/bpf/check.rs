//! Whether what a program did is what the model says.

use ebpf::{Addr, Reason, TestSeen, seen};

use super::{
    model::{Frame, Key, Outcome, TooBig, Verdict},
    packet::{ETH, ICMP, ICMPV6, checksum, pseudo_checksum},
    run::{DROP, NEXT, REDIRECT, Ran},
};

/// What is wrong, in one line or a few; `None`: nothing.
pub fn differs(expected: &Outcome, ran: &Ran) -> Option<String> {
    let (verdict, dropped) = match read(&ran.seen) {
        Ok(read) => read,
        Err(wrong) => return Some(wrong),
    };
    if (verdict, dropped) != (expected.verdict, expected.dropped) {
        return Some(format!("the verdict is {verdict:x?} {dropped:?}"));
    }
    let returned = match verdict {
        Verdict::Next | Verdict::Stack | Verdict::Hop(0, _) => NEXT,
        Verdict::Hop(..) | Verdict::Device(_) | Verdict::Ingress(_) => REDIRECT,
        Verdict::Drop => DROP,
    };
    if ran.returned != returned {
        return Some(format!("it returned {}, not {returned}", ran.returned.cast_signed()));
    }
    if verdict == Verdict::Drop {
        return None;
    }
    if ran.mark != expected.mark {
        return Some(format!("the mark is {:#x}, not {:#x}", ran.mark, expected.mark));
    }
    match &expected.frame {
        Frame::Any => None,
        Frame::Exactly(frame) if *frame == ran.frame => None,
        Frame::Exactly(frame) => Some(format!("the frame is\n{}not\n{}", hex(&ran.frame), hex(frame))),
        Frame::TooBig(error) => {
            error.differs(&ran.frame).map(|wrong| format!("{wrong} in the ICMP error\n{}", hex(&ran.frame)))
        }
    }
}

/// What the program recorded.
pub fn read(seen: &TestSeen) -> Result<(Verdict, Option<Reason>), String> {
    let key = Key { vni: seen.vni, remote: seen.remote, local: seen.local };
    let verdict = match seen.kind {
        seen::NEXT => Verdict::Next,
        seen::STACK => Verdict::Stack,
        seen::HOP => Verdict::Hop(seen.ifindex, key),
        seen::DEVICE => Verdict::Device(seen.ifindex),
        seen::INGRESS => Verdict::Ingress(seen.ifindex),
        seen::DROP => Verdict::Drop,
        _ => return Err(format!("it recorded {seen:x?}")),
    };
    if seen.kind != seen::HOP && key != (Key { vni: 0, remote: Addr::NONE, local: Addr::NONE }) {
        return Err(format!("a key was set: {seen:x?}"));
    }
    let dropped = match seen.reason {
        0 => None,
        reason => Some(*Reason::ALL.get(reason as usize - 1).ok_or_else(|| format!("no such reason: {seen:x?}"))?),
    };
    Ok((verdict, dropped))
}

/// As a reader of RFC 4884 would have it: 16 bytes a line.
pub fn hex(bytes: &[u8]) -> String {
    let line = |(index, line): (usize, &[u8])| {
        let bytes: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("  {:4} {}\n", index * 16, bytes.join(" "))
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

impl TooBig {
    /// What is wrong with the frame.
    fn differs(&self, frame: &[u8]) -> Option<&'static str> {
        let v4 = self.about[0] >> 4 == 4;
        let header = if v4 { 20 } else { 40 };
        let [dst, src] = self.eth;
        let ethertype: [u8; 2] = if v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
        if frame.len() < ETH + header + 8 {
            return Some("too short");
        }
        let (l3, icmp) = (&frame[ETH..], &frame[ETH + header..]);
        let quoted = &icmp[8..];
        let least = self.headers().min(self.about.len());
        let limit = self.limit.to_be_bytes();
        let wrong = [
            ("destination MAC", dst.is_some_and(|mac| frame[..6] != mac)),
            ("source MAC", src.is_some_and(|mac| frame[6..12] != mac)),
            ("ethertype", frame[12..14] != ethertype),
            ("IP header", if v4 { !self.is_v4_header(l3) } else { !self.is_v6_header(l3) }),
            ("type", icmp[..2] != if v4 { [3, 4] } else { [2, 0] }),
            ("limit", icmp[4..8] != [0, 0, limit[0], limit[1]]),
            ("quotation", quoted.len() < least || !self.quotes(quoted)),
            ("size", l3.len() > if v4 { 576 } else { 1280 }),
            ("checksum", if v4 { checksum(icmp) != 0 } else { icmpv6_sum(l3) != 0 }),
        ];
        wrong.into_iter().find(|(_, wrong)| *wrong).map(|(what, _)| what)
    }

    /// Whether that is the packet's beginning. Its transport checksum may be another: nobody can check it on a part, and it
    /// is what keeps the error's own checksum right where the kernel has still to fill one in.
    fn quotes(&self, quoted: &[u8]) -> bool {
        let [mut ours, mut theirs] = [self.about.get(..quoted.len()).unwrap_or_default().to_vec(), quoted.to_vec()];
        if let Some(at) = self.checksum_at {
            for bytes in [&mut ours, &mut theirs] {
                bytes.iter_mut().skip(at).take(2).for_each(|byte| *byte = 0);
            }
        }
        ours == theirs
    }

    /// Bytes of the packet that a receiver needs to know whose it was.
    fn headers(&self) -> usize {
        match self.about[0] >> 4 {
            4 => usize::from(self.about[0] & 15) * 4 + 8,
            _ => 48,
        }
    }

    fn is_v4_header(&self, l3: &[u8]) -> bool {
        let total = u16::from_be_bytes([l3[2], l3[3]]);
        l3[0] == 0x45
            && usize::from(total) == l3.len()
            && l3[6] & 0x3f == 0
            && l3[7] == 0
            && l3[8] >= 32
            && l3[9] == ICMP
            && checksum(&l3[..20]) == 0
            && l3[12..16] == self.about[16..20]
            && l3[16..20] == self.about[12..16]
    }

    fn is_v6_header(&self, l3: &[u8]) -> bool {
        let payload = u16::from_be_bytes([l3[4], l3[5]]);
        l3[0] >> 4 == 6
            && usize::from(payload) + 40 == l3.len()
            && l3[6] == ICMPV6
            && l3[7] >= 32
            && l3[8..24] == self.about[24..40]
            && l3[24..40] == self.about[8..24]
    }
}

fn icmpv6_sum(l3: &[u8]) -> u16 {
    pseudo_checksum(&l3[8..24], &l3[24..40], ICMPV6, &l3[40..])
}
