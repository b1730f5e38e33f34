//! The object for test runs, loaded, and one run of one of its programs.

use agent::state::Program;
use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, TestRun,
    programs::{SchedClassifier, TestRunOptions},
};

use ebpf::TestSeen;

use super::{
    maps::Maps,
    model::{self, Context, Outcome, World},
    packet::ETH,
};

/// `TCX_NEXT`, `TCX_DROP` and `TCX_REDIRECT` of linux/bpf.h.
pub const NEXT: u32 = u32::MAX;
pub const DROP: u32 = 2;
pub const REDIRECT: u32 = 7;

/// What a program must do.
pub fn model_of(program: Program) -> fn(&World, &[u8], &Context) -> Outcome {
    match program {
        Program::Steer => model::steer,
        Program::SteerNative => model::steer_native,
        Program::FromHop => model::from_hop,
        Program::ToPeer => model::to_peer,
        Program::FromPeer => model::from_peer,
    }
}

/// One program of the test object, in the kernel.
pub struct Loaded {
    pub maps: Maps,
    object: Ebpf,
    entry: String,
    frame: Vec<u8>,
}

/// How a test run ended.
pub struct Ran {
    pub returned: u32,
    pub frame: Vec<u8>,
    pub mark: u32,
    pub seen: TestSeen,
}

impl Loaded {
    pub fn new(program: Program) -> Result<Loaded> {
        super::own_bpffs()?;
        let mut object = EbpfLoader::new()
            // Test runs always have an Ethernet header, the WireGuard devices none.
            .override_global("L2", &(ETH as u32), true)
            .load(agent::kernel::object::TEST_OBJECT)?;
        let entry = format!("test_{}", program.name());
        let classifier: &mut SchedClassifier =
            object.program_mut(&entry).with_context(|| format!("the object has no program {entry}"))?.try_into()?;
        classifier.load().with_context(|| format!("load {entry}"))?;
        let maps = Maps::take(&mut object)?;
        Ok(Loaded { maps, object, entry, frame: vec![0; 8192] })
    }

    /// One run, with the context as `__sk_buff` (linux/bpf.h).
    pub fn run(&mut self, frame: &[u8], context: &Context) -> Result<Ran> {
        self.maps.set_key(context.key)?;
        self.maps.clear_seen()?;
        let mut skb = [0_u8; 192];
        let mut set = |at: usize, value: u32| skb[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        set(MARK, context.mark);
        set(INGRESS_IFINDEX, context.ingress_ifindex);
        set(GSO_SIZE, context.gso_size);
        set(GSO_SEGS, context.gso_segs);
        let mut skb_out = [0_u8; 192];
        let program: &SchedClassifier = self.object.program(&self.entry).context("loaded before")?.try_into()?;
        let result = program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut self.frame),
            ctx_in: Some(&skb),
            ctx_out: Some(&mut skb_out),
            ..TestRunOptions::default()
        })?;
        let mark = u32::from_ne_bytes([skb_out[MARK], skb_out[MARK + 1], skb_out[MARK + 2], skb_out[MARK + 3]]);
        let frame = self.frame[..result.data_size_out as usize].to_vec();
        Ok(Ran { returned: result.return_value, frame, mark, seen: self.maps.seen()? })
    }
}

// Offsets of `__sk_buff`'s fields.
const MARK: usize = 8;
const INGRESS_IFINDEX: usize = 36;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;
