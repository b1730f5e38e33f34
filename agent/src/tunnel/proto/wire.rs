//! The words that frames are made of: integers, addresses, prefixes, options. Big-endian; counts are u32.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnetwork::IpNetwork;
use zeroize::Zeroizing;

use super::Malformed;
use crate::{
    keys::PublicKey,
    names::{Device, Ordinal},
};

/// Appends to a buffer. Made with room for the whole of a request with keys, so that no copy stays behind unwiped.
pub(super) struct Out(pub(super) Zeroizing<Vec<u8>>);

impl Out {
    pub(super) fn with_capacity(bytes: usize) -> Out {
        Out(Zeroizing::new(Vec::with_capacity(bytes)))
    }

    pub(super) fn u8(&mut self, n: u8) {
        self.0.push(n);
    }

    pub(super) fn u16(&mut self, n: u16) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn u32(&mut self, n: u32) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn u64(&mut self, n: u64) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn count(&mut self, n: usize) {
        self.u32(u32::try_from(n).unwrap_or(u32::MAX));
    }

    pub(super) fn device(&mut self, device: Device) {
        self.u8(device.0.get());
    }

    pub(super) fn ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(ip) => {
                self.u8(4);
                self.bytes(&ip.octets());
            }
            IpAddr::V6(ip) => {
                self.u8(6);
                self.bytes(&ip.octets());
            }
        }
    }

    pub(super) fn nets<'a>(&mut self, nets: impl ExactSizeIterator<Item = &'a IpNetwork>) {
        self.count(nets.len());
        for net in nets {
            self.ip(net.ip());
            self.u8(net.prefix());
        }
    }

    pub(super) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Out, T)) {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }

    pub(super) fn endpoint(&mut self, endpoint: Option<SocketAddr>) {
        self.option(endpoint, |out, endpoint| {
            out.ip(endpoint.ip());
            out.u16(endpoint.port());
        });
    }
}

/// Reads from a frame's body.
pub(super) struct In<'a>(pub(super) &'a [u8]);

impl In<'_> {
    pub(super) fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed(what))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.take(what).map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.take(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.take(what).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        self.take(what).map(u64::from_be_bytes)
    }

    pub(super) fn device(&mut self) -> Result<Device, Malformed> {
        let ordinal = self.u8("device")?;
        Ordinal::new(ordinal.into()).map(Device).ok_or(Malformed("device: above 7"))
    }

    pub(super) fn port(&mut self) -> Result<u16, Malformed> {
        self.u16("port").and_then(|port| if port == 0 { Err(Malformed("port: 0")) } else { Ok(port) })
    }

    pub(super) fn public(&mut self) -> Result<PublicKey, Malformed> {
        PublicKey::new(self.take("public key")?).map_err(|_| Malformed("public key: zero or of low order"))
    }

    /// A key that the tunnel has accepted before.
    pub(super) fn known_public(&mut self) -> Result<PublicKey, Malformed> {
        self.take("public key").map(PublicKey::assume_valid)
    }

    pub(super) fn ip(&mut self) -> Result<IpAddr, Malformed> {
        match self.u8("address family")? {
            4 => self.take("address").map(|octets: [u8; 4]| Ipv4Addr::from(octets).into()),
            6 => self.take("address").map(|octets: [u8; 16]| Ipv6Addr::from(octets).into()),
            _ => Err(Malformed("address family: neither 4 nor 6")),
        }
    }

    pub(super) fn nets<C: Default + Extend<IpNetwork>>(&mut self) -> Result<C, Malformed> {
        let mut nets = C::default();
        for _ in 0..self.u32("number of prefixes")? {
            let (ip, len) = (self.ip()?, self.u8("prefix length")?);
            let net = IpNetwork::new(ip, len).map_err(|_| Malformed("prefix length: too large"))?;
            nets.extend([net]);
        }
        Ok(nets)
    }

    pub(super) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.u8("option")? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(Malformed("option: neither 0 nor 1")),
        }
    }

    pub(super) fn endpoint(&mut self) -> Result<Option<SocketAddr>, Malformed> {
        self.option(|input| Ok(SocketAddr::new(input.ip()?, input.port()?)))
    }

    pub(super) fn end<T>(self, value: T) -> Result<T, Malformed> {
        if self.0.is_empty() { Ok(value) } else { Err(Malformed("frame: bytes left over")) }
    }
}
