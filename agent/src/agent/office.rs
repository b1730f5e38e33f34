//! The place in the agent of this node's business with the API server: what is told, and what was said last.

use tokio::sync::watch::{self, Receiver, Sender};

use crate::{
    args,
    gateway::{self, Gateway, Known, Said, Standing},
    names::NodeName,
    source::{Origin, Snapshot},
    survey::{SlotKeys, node_name},
};

/// Without an API server it tells nobody, and nothing is ever said.
#[derive(Debug)]
pub(super) struct Office {
    pub(super) tell: Option<Sender<Known>>,
    pub(super) said: Said,
    /// Keeps what is listened to open where nobody speaks.
    _silence: Option<Sender<Said>>,
}

impl Office {
    /// Must be called within a tokio runtime.
    pub(super) fn new(origin: &Origin, args: &args::Node) -> (Office, Receiver<Said>) {
        match origin {
            Origin::Folders(_) => {
                let (silence, said) = watch::channel(Said::default());
                (Office { tell: None, said: Said::default(), _silence: Some(silence) }, said)
            }
            Origin::Kube(server) => {
                let gateway = Gateway::new(node_name(args), args.cluster_name.clone(), args.gateway_slots);
                let (tell, said) = gateway::follow(server.clone(), gateway);
                (Office { tell: Some(tell), said: Said::default(), _silence: None }, said)
            }
        }
    }

    /// The snapshot as it is to this node, if that is another.
    pub(super) fn amended(&self, me: &NodeName, snapshot: &Snapshot) -> Option<Snapshot> {
        let objects = self.said.standing.amend(me, &snapshot.objects)?;
        Some(Snapshot { objects, complete: snapshot.complete, problems: snapshot.problems.clone() })
    }

    pub(super) fn keys(&self) -> SlotKeys<'_> {
        match (&self.tell, &self.said.standing) {
            (None, _) => SlotKeys::Folder,
            (Some(_), Standing::Gateway(held)) => SlotKeys::Secret(Some(&held.keys)),
            (Some(_), Standing::Unknown | Standing::Worker) => SlotKeys::Secret(None),
        }
    }
}
