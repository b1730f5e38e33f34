//! The command line of `kubectl carrick`: this program under another name. kubectl hands it everything that follows.

use std::path::Path;

use clap::{Args as ClapArgs, Parser, Subcommand};

use super::{Access, DEFAULT_NAMESPACE, Export, Output, Validate, ordinal};
use crate::{
    keys::PublicKey,
    names::{NodeName, Ordinal},
};

/// What kubectl looks for in the PATH.
const FILE: &str = "kubectl-carrick";

/// Asks the agents of the kubeconfig's cluster, and writes and checks the mesh's folder.
///
/// To install it, link `carrick` to `kubectl-carrick` in a folder of the PATH.
#[derive(Debug, Parser)]
#[command(name = FILE, bin_name = "kubectl carrick", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Plugin {
    #[command(subcommand)]
    pub command: PluginCommand,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Shows what each agent says, by `carrick status` in its pod. Exit code 1 if one of them is not ready, or cannot be
    /// asked. `-o json` and `-o yaml` give one object, by nodes' names; with `--node`, what that agent says.
    Status(Agents),
    /// Prints the operations that each agent would perform now, by `carrick plan` in its pod, and performs none.
    Plan(Agents),
    /// Writes the cluster's part of the mesh's folder, from what its API server says: its MeshCluster, with the gateways'
    /// keys and a free id, and its RouteAdvertisement. What the folder says already stays.
    Export(Export),
    /// Checks a folder of manifests; without one, what the API server has. Prints every refusal; exit code 1 if there is
    /// any.
    Validate(Validate),
    /// Shows and replaces the WireGuard keys of a slot, which are in its Secret, `carrick-gateway-N`.
    ///
    /// To replace one: `keys add`; name the new one in the mesh's folder, in place of the old, and apply that in every
    /// cluster; then `keys drop` the old one. The slot's traffic moves to the new key as each cluster hears of it:
    /// drain the gateway before, where nothing may be lost. Until the gateway uses the new key, some seconds later,
    /// `export` would write the old one again.
    #[command(subcommand)]
    Keys(SecretKeys),
}

#[derive(Debug, Subcommand)]
pub enum SecretKeys {
    /// Prints the public half of the slot's keys.
    Show {
        #[command(flatten)]
        slot: OfSlot,
        #[command(flatten)]
        output: Output,
    },
    /// Adds a second key, and prints its public half. The gateway uses the one that the mesh's folder names.
    Add {
        #[command(flatten)]
        slot: OfSlot,
    },
    /// Takes a key away that is no longer used.
    Drop {
        /// Its public half.
        #[arg(value_name = "PUBLIC KEY")]
        key: PublicKey,
        #[command(flatten)]
        slot: OfSlot,
    },
}

/// Which Secret, and how to get there.
#[derive(Clone, Debug, ClapArgs)]
pub struct OfSlot {
    /// The gateway slot, 0 to 7.
    #[arg(long, value_name = "N", default_value = "0", value_parser = ordinal)]
    pub ordinal: Ordinal,
    /// Where the chart is installed.
    #[arg(short, long, value_name = "NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pub namespace: String,
    #[command(flatten)]
    pub access: Access,
}

/// Which agents, and how to get there.
#[derive(Clone, Debug, ClapArgs)]
pub struct Agents {
    /// Asks only the agent of this node. Default: each of them.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// Where the chart is installed.
    #[arg(short, long, value_name = "NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pub namespace: String,
    #[command(flatten)]
    pub access: Access,
    #[command(flatten)]
    pub output: Output,
}

impl Plugin {
    pub(super) fn read() -> Plugin {
        Plugin::parse().settled()
    }

    /// A folder or the API server: there is no third.
    fn settled(mut self) -> Plugin {
        if let PluginCommand::Validate(Validate { dirs, api, .. }) = &mut self.command {
            api.kube |= dirs.is_empty();
        }
        self
    }
}

/// Whether a program of this path is the plugin.
pub(super) fn is_named_by(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name == FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Origin;

    #[test]
    fn the_file_s_name_decides() {
        let called =
            ["/usr/local/bin/kubectl-carrick", "kubectl-carrick", "carrick", "/opt/kubectl-carrick/carrick", ""];
        assert_eq!(called.map(|path| is_named_by(Path::new(path))), [true, true, false, false, false]);
    }

    #[test]
    fn without_a_folder_the_api_server_is_checked() {
        let origin = |line: &str| match Plugin::try_parse_from(line.split(' ')).unwrap().settled().command {
            PluginCommand::Validate(validate) => validate.origin(),
            other => panic!("{other:?}"),
        };
        let Origin::Kube(server) = origin("kubectl-carrick validate --context va") else { panic!("a folder") };
        assert_eq!(server.context.as_deref(), Some("va"));
        let Origin::Folders(dirs) = origin("kubectl-carrick validate mesh") else { panic!("an API server") };
        assert_eq!(dirs, [Path::new("mesh")]);
    }
}
