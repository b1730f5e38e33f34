//! Our `ip rule`s: those with one of our priorities *and* its table; the rest of what they say must then be ours too.

use std::{collections::BTreeMap, io};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};

use super::{
    route::address_family,
    rtnl::{Rtnl, absent_is_done, is},
};
use crate::{
    names::Table,
    state::{Family, Lookups, Rule},
};

/// The incoming device of what the node itself sends.
const LOOPBACK: &str = "lo";

/// Our rules that stand exactly once and as [`set`] writes them. One that somebody has altered or doubled is left
/// out, so that it is added again.
pub(super) async fn read(rtnl: &Rtnl) -> io::Result<BTreeMap<Rule, Lookups>> {
    let mut rules = BTreeMap::new();
    for family in Family::ALL {
        let found = dump(rtnl, family).await?;
        rules.extend(Table::ALL.map(|table| Rule { family, table }).into_iter().filter_map(|rule| {
            let mut ours = found.iter().filter(|message| claims(message, rule));
            let lookups = ours.next().and_then(lookups)?;
            ours.next().is_none().then_some((rule, lookups))
        }));
    }
    Ok(rules)
}

/// Puts the rule in place, once, and removes its altered forms. There is no moment without it: the new one goes behind
/// those of its priority, and then as many as stood there before are removed from the front.
pub(super) async fn set(rtnl: &Rtnl, rule: Rule, lookups: &Lookups) -> io::Result<()> {
    let before = count(rtnl, rule).await?;
    // Without NLM_F_EXCL a rule that exists is added a second time.
    rtnl.change(RouteNetlinkMessage::NewRule(encode(rule, lookups)), NLM_F_CREATE).await?;
    remove_first(rtnl, rule, before).await
}

/// Removes the rule and its altered forms.
pub(super) async fn delete(rtnl: &Rtnl, rule: Rule) -> io::Result<()> {
    let before = count(rtnl, rule).await?;
    remove_first(rtnl, rule, before).await
}

async fn count(rtnl: &Rtnl, rule: Rule) -> io::Result<usize> {
    let found = dump(rtnl, rule.family).await?;
    Ok(found.iter().filter(|message| claims(message, rule)).count())
}

/// The kernel deletes the first rule in which everything holds that the request says.
async fn remove_first(rtnl: &Rtnl, rule: Rule, times: usize) -> io::Result<()> {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.attributes = vec![RuleAttribute::Table(rule.table.id()), RuleAttribute::Priority(rule.priority())];
    for _ in 0..times {
        absent_is_done(rtnl.change(RouteNetlinkMessage::DelRule(message.clone()), 0).await)?;
    }
    Ok(())
}

async fn dump(rtnl: &Rtnl, family: Family) -> io::Result<Vec<RuleMessage>> {
    let mut message = RuleMessage::default();
    message.header.family = address_family(family);
    let answers = match rtnl.dump(RouteNetlinkMessage::GetRule(message)).await {
        // IPv6 is not compiled in, or off by `ipv6.disable=1`.
        Err(error) if family == Family::V6 && is(&error, &[libc::EOPNOTSUPP, libc::EAFNOSUPPORT]) => Vec::new(),
        answers => answers?,
    };
    let rule = |answer| if let RouteNetlinkMessage::NewRule(rule) = answer { Some(rule) } else { None };
    Ok(answers.into_iter().filter_map(rule).filter(|rule| rule.header.family == address_family(family)).collect())
}

/// Whether a rule has the priority and table of one of ours.
fn claims(message: &RuleMessage, rule: Rule) -> bool {
    priority(message) == rule.priority() && table(message) == rule.table.id()
}

/// The priority in a rule message.
pub(super) fn priority(message: &RuleMessage) -> u32 {
    let given =
        message.attributes.iter().find_map(|a| if let RuleAttribute::Priority(p) = a { Some(*p) } else { None });
    given.unwrap_or(0)
}

/// The table in a rule message.
pub(super) fn table(message: &RuleMessage) -> u32 {
    let long = message.attributes.iter().find_map(|a| if let RuleAttribute::Table(id) = a { Some(*id) } else { None });
    long.unwrap_or(message.header.table.into())
}

fn encode(rule: Rule, lookups: &Lookups) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Table(rule.table.id()),
        RuleAttribute::Priority(rule.priority()),
        RuleAttribute::Protocol(RouteProtocol::Kernel),
    ];
    let but_for = match lookups {
        Lookups::All => return message,
        Lookups::Forwarded => RuleAttribute::Iifname(LOOPBACK.to_owned()),
        Lookups::NotBoundTo(device) => RuleAttribute::Oifname(device.clone()),
    };
    message.header.flags = RuleFlags::Invert;
    message.attributes.push(but_for);
    message
}

/// `None` for a rule that is otherwise than [`encode`] writes any.
fn lookups(message: &RuleMessage) -> Option<Lookups> {
    let (mut but_for, mut protocol) = (Vec::new(), RouteProtocol::Unspec);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(_) | RuleAttribute::Priority(_) => {}
            RuleAttribute::Iifname(name) if name == LOOPBACK => but_for.push(Lookups::Forwarded),
            RuleAttribute::Oifname(name) => but_for.push(Lookups::NotBoundTo(name.clone())),
            RuleAttribute::Protocol(found) => protocol = *found,
            // Always sent; without suppression it is -1.
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => return None,
        }
    }
    let header = &message.header;
    let plain = (header.src_len, header.dst_len, header.tos) == (0, 0, 0);
    if !plain || protocol != RouteProtocol::Kernel || header.action != RuleAction::ToTable {
        return None;
    }
    match (header.flags.contains(RuleFlags::Invert), but_for.as_slice()) {
        (false, []) => Some(Lookups::All),
        (true, [lookups]) => Some(lookups.clone()),
        _ => None,
    }
}
