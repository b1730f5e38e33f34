//! A cluster as it is now, asked once, for a person's command: each question needs one right, and names it where it lacks.

use std::fmt;

use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{
    Api, Client, Error,
    api::{ListParams, ObjectList},
};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{
    ConnectError, NODES, Server,
    prune::{KubeNode, Prune},
    watch::{ANSWER, Trouble, failure, unanswered},
};
use crate::api::{MeshGateway, Objects};

/// An API server that is asked.
pub struct Once {
    client: Client,
    host: String,
}

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once").field("host", &self.host).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{host}: {why}")]
pub struct AskError {
    /// The API server's address.
    pub host: String,
    /// With what to do.
    pub why: String,
    /// It may be gone by the next time: a kind that has just been made is not served at once.
    pub passes: bool,
}

impl Server {
    /// To ask it. Nothing is asked yet.
    pub async fn once(&self) -> Result<Once, ConnectError> {
        let (client, host) = self.connect().await?;
        Ok(Once { client, host })
    }
}

impl Once {
    /// The MeshGateways and the Nodes, and nothing else.
    pub async fn gateways_and_nodes(&self) -> Result<Objects, AskError> {
        let gateways = self.list(&Api::<MeshGateway>::all(self.client.clone()), "meshgateways").await?;
        let nodes = self.list(&Api::<KubeNode>::all_with(self.client.clone(), &NODES.resource()), "nodes").await?;
        Ok(Objects { gateways: pruned(gateways), nodes: pruned(nodes), ..Objects::default() })
    }

    /// The arguments of a DaemonSet's container.
    pub async fn arguments(&self, namespace: &str, name: &str, container: &str) -> Result<Vec<String>, AskError> {
        let sets = Api::<DaemonSet>::namespaced(self.client.clone(), namespace);
        let set = self.answer(sets.get(name), "daemonsets").await?;
        let pod = set.spec.and_then(|spec| spec.template.spec);
        let containers = pod.map(|pod| pod.containers).unwrap_or_default();
        let wanted = containers.into_iter().find(|one| one.name == container);
        Ok(wanted.and_then(|container| container.args).unwrap_or_default())
    }

    async fn list<K>(&self, api: &Api<K>, plural: &str) -> Result<ObjectList<K>, AskError>
    where
        K: Clone + DeserializeOwned + fmt::Debug,
    {
        self.answer(api.list(&ListParams::default()), plural).await
    }

    async fn answer<T>(&self, asked: impl Future<Output = Result<T, Error>>, plural: &str) -> Result<T, AskError> {
        let (why, passes) = match timeout(ANSWER, asked).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(Error::Api(status))) => match status.code {
                403 => (format!("{} (403): have that right granted", status.message), false),
                404 if plural == "meshgateways" => (Trouble::NotServed.told().to_owned(), true),
                code => (failure(&Error::Api(status), plural), code == 429 || code >= 500),
            },
            Ok(Err(error)) => (failure(&error, plural), false),
            Err(_) => (unanswered(), false),
        };
        Err(AskError { host: self.host.clone(), why, passes })
    }
}

fn pruned<K: Prune + Clone>(list: ObjectList<K>) -> Vec<K::Pruned> {
    list.items.into_iter().map(Prune::prune).collect()
}
