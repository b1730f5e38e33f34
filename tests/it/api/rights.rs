//! Whom the chart's RBAC and admission policies let do what, asked for real. Cases are data; `UPDATE_EXPECT=1` writes the
//! answers anew.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use expect_test::expect_file;
use serde_json::{Value, json};

use super::{
    client::{Answer, Ask},
    kubernetes::{ADMIN, CARRICK, object},
    world::{KEYS, KUBELET, NEW_KUBELET, TENANT, World, advertisement, cluster},
};

const CASES: &str = include_str!("cases/rights.txt");

pub(super) fn each_may_do_its_own_and_nothing_else(world: &mut World) -> Result<()> {
    // What is refused is there: nothing is refused because it is missing.
    world.put("meshclusters", &[cluster("mn", 1, KEYS[0], &["10.42.0.0/16"])])?;
    world.put("routeadvertisements", &[advertisement("mn", &["10.42.0.0/16"])])?;
    world.put("egresspolicies", &[object("EgressPolicy", "all", &json!({}))])?;
    for name in ["carrick-psk", "other", "carrick-gateway-8"] {
        world.admin(&Ask::apply(
            &format!("{CARRICK}/secrets/{name}"),
            json!({"apiVersion": "v1", "kind": "Secret", "data": {"k": "c2VjcmV0"}}),
        ))?;
    }
    let tokens = tokens(world)?;
    let (mut text, mut wrong, mut allowed) = (String::new(), Vec::new(), None);
    for line in CASES.lines().filter(|line| !line.starts_with("=>")) {
        text += &format!("{line}\n");
        match line {
            "## allowed" => allowed = Some(true),
            "## refused" => allowed = Some(false),
            _ if line.is_empty() || line.starts_with('#') => {}
            _ => {
                let (who, ask) = read(line)?;
                let token = tokens.get(who).with_context(|| format!("who is {who}?"))?;
                let answer = world.ask(token, &ask)?;
                text += &format!("=> {}\n", shown(&answer));
                let refused = answer.as_ref().is_err_and(|refusal| matches!(refusal.code, 403 | 422));
                let wanted = allowed.context("a case stands under a heading")?;
                if wanted != answer.is_ok() || wanted == refused {
                    wrong.push(format!("{line}\n  {}", shown(&answer)));
                }
            }
        }
    }
    expect_file!["cases/rights.txt"].assert_eq(&text);
    ensure!(wrong.is_empty(), "these must be otherwise:\n{}", wrong.join("\n"));
    Ok(())
}

fn tokens(world: &World) -> Result<BTreeMap<&'static str, String>> {
    let bound = |account, node| world.token(account, node);
    let unbound = world.admin(&Ask::create(&format!("{CARRICK}/serviceaccounts/carrick-gateway/token"), json!({})))?;
    Ok(BTreeMap::from([
        ("admin", ADMIN.to_owned()),
        ("kubelet@mn-1", KUBELET.to_owned()),
        ("kubelet@mn-9", NEW_KUBELET.to_owned()),
        ("tenant", TENANT.to_owned()),
        ("worker@mn-1", bound("carrick-worker", "mn-1")?),
        ("gateway@mn-0", bound("carrick-gateway", "mn-0")?),
        ("gateway@mn-1", bound("carrick-gateway", "mn-1")?),
        ("gateway", unbound["status"]["token"].as_str().context("a token")?.to_owned()),
    ]))
}

fn read(line: &str) -> Result<(&str, Ask)> {
    let mut words = line.splitn(4, ' ');
    let mut word = || words.next().with_context(|| format!("WHO METHOD PATH [BODY]: {line}"));
    let (who, method, path) = (word()?, word()?, word()?);
    let body: Value = words.next().map_or(Ok(Value::Null), serde_json::from_str).with_context(|| line.to_owned())?;
    let ask = match method {
        "GET" => Ask::get(path),
        "DELETE" => Ask::delete(path),
        "POST" => Ask::create(path, body),
        "MERGE" => Ask::merge(path, body),
        "APPLY" => Ask::apply(path, body),
        _ => bail!("what is {method}?"),
    };
    Ok((who, ask))
}

/// The reason is what stands behind the object.
fn shown(answer: &Answer) -> String {
    match answer {
        Ok(_) => "done".to_owned(),
        Err(refusal) => {
            let reason = refusal.message.split_once(" is forbidden: ").map_or(&*refusal.message, |(_, reason)| reason);
            format!("{} {reason}", refusal.code)
        }
    }
}
