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
    problems: Vec<String>,
    rejections: Vec<String>,
    warnings: Vec<String>,
}

pub(super) fn run(args: args::Validate) -> anyhow::Result<bool> {
    let snapshot = source::read_once(&args.dirs)?;
    let (mesh, mut rejected) = intent::mesh(&snapshot.objects, &args.mesh_domain);
    if let Some(cluster) = args.cluster_name {
        let local = Local { cluster, cidrs: args.local_cidrs, api_server: None };
        rejected.extend(Intent::new(&mesh, &snapshot.objects, &local).1);
    }
    let answer = Answer {
        ok: rejected.is_empty() && snapshot.problems.is_empty(),
        members: mesh.members.len(),
        routes: mesh.members.values().map(|member| member.routes.len()).sum(),
        problems: snapshot.problems.iter().map(ToString::to_string).collect(),
        rejections: rejected.iter().map(ToString::to_string).collect(),
        warnings: intent::warnings(&mesh).iter().map(ToString::to_string).collect(),
    };
    super::print(args.output.output, &answer, || {
        let said = [("problem", &answer.problems), ("refused", &answer.rejections), ("warning", &answer.warnings)];
        let lines = said.iter().flat_map(|(what, list)| list.iter().map(move |one| format!("{what}: {one}\n")));
        let count = format!(
            "{} members, {} routes accepted, {} refused\n",
            answer.members,
            answer.routes,
            answer.rejections.len()
        );
        lines.chain([count]).collect()
    })?;
    Ok(answer.ok)
}
