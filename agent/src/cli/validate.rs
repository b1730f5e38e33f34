//! `carrick validate`.

use serde::Serialize;

use crate::{
    args,
    intent::{self, Intent, Local},
    source,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    ok: bool,
    members: usize,
    routes: usize,
    /// Of the member whose folder this is; 0 if no document tells of any.
    nodes: usize,
    problems: Vec<String>,
    rejections: Vec<String>,
    warnings: Vec<String>,
}

pub(super) async fn run(args: args::Validate) -> anyhow::Result<bool> {
    let snapshot = source::read(&args.origin()).await?;
    let (mesh, mut rejected) = intent::mesh(&snapshot.objects, &args.mesh_domain);
    let (cluster, refused_here) = match args.cluster_name {
        Some(cluster) => {
            let local = Local { cluster, cidrs: args.local_cidrs, api_server: None };
            let (intent, refused) = Intent::new(&mesh, &snapshot.objects, &local);
            (intent.cluster, refused)
        }
        None => intent::nodes(&snapshot.objects),
    };
    rejected.extend(refused_here);
    let answer = Answer {
        ok: rejected.is_empty() && snapshot.problems.is_empty(),
        members: mesh.members.len(),
        routes: mesh.members.values().map(|member| member.routes.len()).sum(),
        nodes: cluster.map_or(0, |cluster| cluster.nodes.len()),
        problems: snapshot.problems.iter().map(ToString::to_string).collect(),
        rejections: rejected.iter().map(ToString::to_string).collect(),
        warnings: intent::warnings(&mesh).iter().map(ToString::to_string).collect(),
    };
    super::print(args.output.output, &answer, || {
        let said = [("problem", &answer.problems), ("refused", &answer.rejections), ("warning", &answer.warnings)];
        let lines = said.iter().flat_map(|(what, list)| list.iter().map(move |one| format!("{what}: {one}\n")));
        let count = format!(
            "{} members, {} routes{} accepted, {} refused\n",
            answer.members,
            answer.routes,
            if answer.nodes > 0 { format!(", {} nodes", answer.nodes) } else { String::new() },
            answer.rejections.len()
        );
        lines.chain([count]).collect()
    })?;
    Ok(answer.ok)
}
