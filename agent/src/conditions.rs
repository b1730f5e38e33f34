//! What this cluster says of the mesh's objects in their status. Pure: what stands, what was refused and what gateways
//! report go in, what is to stand comes out.
//!
//! Invariants: two writers with the same folder and the same MeshGateways want the same; what stands and is still true is
//! not written again, and a condition's time changes only with its status.

use std::collections::BTreeMap;

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::core::{ApiResource, ObjectMeta};

use crate::{
    api::{EgressPolicy, MeshCluster, MeshGatewayStatus, ObjectStatus, Objects, RouteAdvertisement},
    intent::{Kind, Reason, Rejection},
    names::{MemberName, Ordinal},
};

/// Nothing of the object is refused.
pub const ACCEPTED: &str = "Accepted";
/// The object is accepted as it is, and in force in this cluster.
pub const READY: &str = "Ready";
/// Of a MeshCluster: a gateway of this cluster gets answers from one of that member.
pub const CONNECTED: &str = "Connected";
/// Tells kstatus that the object will not become ready unless somebody changes it.
pub const STALLED: &str = "Stalled";

/// Bytes of a message at most: an event's note has room for 1024.
const LONGEST: usize = 1000;
/// Refused values that a message spells out.
const SPELT: usize = 4;

/// The kinds whose objects all members share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shared {
    MeshCluster,
    RouteAdvertisement,
    EgressPolicy,
}

impl Shared {
    pub fn resource(self) -> ApiResource {
        match self {
            Shared::MeshCluster => ApiResource::erase::<MeshCluster>(&()),
            Shared::RouteAdvertisement => ApiResource::erase::<RouteAdvertisement>(&()),
            Shared::EgressPolicy => ApiResource::erase::<EgressPolicy>(&()),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Shared::MeshCluster => Kind::MeshCluster,
            Shared::RouteAdvertisement => Kind::RouteAdvertisement,
            Shared::EgressPolicy => Kind::EgressPolicy,
        }
    }
}

/// An object that this cluster has something to say of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub kind: Shared,
    pub name: String,
    /// So that nothing is said of a later object with that name.
    pub uid: String,
}

/// What stands of an object, and what is to stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Saying {
    /// Of the spec that it is about.
    generation: i64,
    stands: Option<ObjectStatus>,
    /// In the order of their types.
    wanted: Vec<Wanted>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    kind: &'static str,
    holds: Holds,
    reason: &'static str,
    message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    True,
    False,
    Unknown,
}

impl Holds {
    fn as_str(self) -> &'static str {
        match self {
            Holds::True => "True",
            Holds::False => "False",
            Holds::Unknown => "Unknown",
        }
    }
}

/// What is to be said of each object that the API server has. `me`: this cluster's member. `reports`: of those gateways of
/// this cluster that answer.
pub fn sayings(
    objects: &Objects,
    rejected: &[Rejection],
    me: &MemberName,
    reports: &BTreeMap<Ordinal, MeshGatewayStatus>,
) -> BTreeMap<Subject, Saying> {
    let mut refused: BTreeMap<(Kind, &str), Vec<&Rejection>> = BTreeMap::new();
    for rejection in rejected {
        refused.entry((rejection.kind, &rejection.name)).or_default().push(rejection);
    }
    let say = |kind: Shared, meta: &ObjectMeta, status: &Option<ObjectStatus>, more: Option<Wanted>| {
        let (name, uid) = (meta.name.clone()?, meta.uid.clone()?);
        let mut wanted = judged(refused.get(&(kind.kind(), &*name)).map_or(&[], Vec::as_slice));
        wanted.extend(more);
        wanted.sort_by_key(|wanted| wanted.kind);
        let saying = Saying { generation: meta.generation?, stands: status.clone(), wanted };
        Some((Subject { kind, name, uid }, saying))
    };
    let clusters = objects.clusters.iter().map(|cluster| {
        let name = cluster.metadata.name.as_deref().unwrap_or_default();
        let connected = (name != me.as_str()).then(|| connected(name, reports));
        say(Shared::MeshCluster, &cluster.metadata, &cluster.status, connected)
    });
    let advertisements =
        objects.advertisements.iter().map(|one| say(Shared::RouteAdvertisement, &one.metadata, &one.status, None));
    let policies = objects.policies.iter().map(|one| say(Shared::EgressPolicy, &one.metadata, &one.status, None));
    clusters.chain(advertisements).chain(policies).flatten().collect()
}

/// Whether an object is taken as it is.
fn judged(refused: &[&Rejection]) -> Vec<Wanted> {
    let Some(first) = refused.first() else {
        return [ACCEPTED, READY].map(|kind| wanted(kind, Holds::True, "Accepted", String::new())).into();
    };
    // What waits for another object becomes ready without being touched.
    let waits = |rejection: &&Rejection| rejection.reason == Reason::UnknownCluster;
    let reason = refused.iter().find(|rejection| !waits(rejection)).unwrap_or(first).reason.as_str();
    let spelt: Vec<String> = refused
        .iter()
        .take(SPELT)
        .map(|rejection| format!("{}: {}: {}", rejection.field, rejection.reason, rejection.message))
        .collect();
    let more = refused.len() - spelt.len();
    let more = if more > 0 { format!("; and {more} more: `carrick validate` tells more") } else { String::new() };
    let message = shortened(format!("{}{more}", spelt.join("; ")));
    let stalled = (!refused.iter().all(waits)).then(|| wanted(STALLED, Holds::True, reason, message.clone()));
    let told = [ACCEPTED, READY].map(|kind| wanted(kind, Holds::False, reason, message.clone()));
    told.into_iter().chain(stalled).collect()
}

fn connected(member: &str, reports: &BTreeMap<Ordinal, MeshGatewayStatus>) -> Wanted {
    let by = |(_, report): &(&Ordinal, &MeshGatewayStatus)| {
        report.members.iter().any(|reached| reached.name == member && reached.gateways > 0)
    };
    let through: Vec<String> = reports.iter().filter(by).map(|(slot, _)| slot.to_string()).collect();
    if !through.is_empty() {
        return wanted(CONNECTED, Holds::True, "Answers", format!("through the gateways {}", through.join(", ")));
    }
    if reports.is_empty() {
        let message = "no gateway of this cluster has reported yet".to_owned();
        return wanted(CONNECTED, Holds::Unknown, "NoReport", message);
    }
    let all: Vec<String> = reports.keys().map(ToString::to_string).collect();
    let message = format!("no answer through any of the gateways {}: `carrick status` there says why", all.join(", "));
    wanted(CONNECTED, Holds::False, "NoAnswer", message)
}

fn wanted(kind: &'static str, holds: Holds, reason: &'static str, message: String) -> Wanted {
    Wanted { kind, holds, reason, message }
}

fn shortened(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST - 4).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text += " ...";
    }
    text
}

/// What has come or gone, for people: a transition that is worth an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// It is as it should be.
    pub good: bool,
    pub reason: String,
    pub note: String,
    /// The condition's type.
    pub about: String,
}

impl Saying {
    /// The status to write; `None`: what stands is true.
    pub fn due(&self, now: Timestamp) -> Option<ObjectStatus> {
        let before = self.stands.as_ref().map_or(&[][..], |status| &status.conditions);
        let is_same = |(stands, wanted): (&Condition, &Wanted)| {
            stands.type_ == wanted.kind
                && stands.status == wanted.holds.as_str()
                && stands.reason == wanted.reason
                && stands.message == wanted.message
        };
        let mut sorted: Vec<&Condition> = before.iter().collect();
        sorted.sort_by(|a, b| a.type_.cmp(&b.type_));
        let observed = self.stands.as_ref().and_then(|status| status.observed_generation);
        if observed == Some(self.generation)
            && sorted.len() == self.wanted.len()
            && sorted.into_iter().zip(&self.wanted).all(is_same)
        {
            return None;
        }
        let since = |wanted: &Wanted| {
            let stands = before.iter().find(|condition| condition.type_ == wanted.kind);
            let same = stands.filter(|condition| condition.status == wanted.holds.as_str());
            same.map_or_else(|| Time(now), |condition| condition.last_transition_time.clone())
        };
        let conditions = self.wanted.iter().map(|wanted| Condition {
            last_transition_time: since(wanted),
            message: wanted.message.clone(),
            observed_generation: Some(self.generation),
            reason: wanted.reason.to_owned(),
            status: wanted.holds.as_str().to_owned(),
            type_: wanted.kind.to_owned(),
        });
        Some(ObjectStatus { observed_generation: Some(self.generation), conditions: conditions.collect() })
    }

    /// What people are told when this is written: what was said otherwise before, and what was never well.
    pub fn news(&self) -> Vec<News> {
        let before = |kind: &str| {
            let stands = self.stands.iter().flat_map(|status| &status.conditions);
            stands.filter(|condition| condition.type_ == kind).map(|condition| &*condition.status).next()
        };
        let told = self.wanted.iter().filter(|wanted| [ACCEPTED, CONNECTED].contains(&wanted.kind));
        let is_news = |wanted: &&Wanted| match (before(wanted.kind).unwrap_or("Unknown"), wanted.holds) {
            ("Unknown", Holds::True) | (_, Holds::Unknown) => false,
            (before, holds) => before != holds.as_str(),
        };
        told.filter(is_news)
            .map(|wanted| News {
                good: wanted.holds == Holds::True,
                reason: if wanted.kind == CONNECTED && wanted.holds == Holds::True { CONNECTED } else { wanted.reason }
                    .to_owned(),
                note: wanted.message.clone(),
                about: wanted.kind.to_owned(),
            })
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Write;

    use expect_test::{Expect, expect};
    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        api::ReachedMember,
        intent::{self, Intent, Local},
    };

    const ME: &str = "m1";

    fn objects(clusters: Value, advertisements: Value) -> Objects {
        let mut objects = Objects {
            clusters: serde_json::from_value(clusters).unwrap(),
            advertisements: serde_json::from_value(advertisements).unwrap(),
            ..Objects::default()
        };
        let clusters = objects.clusters.iter_mut().map(|cluster| &mut cluster.metadata);
        let all = clusters.chain(objects.advertisements.iter_mut().map(|one| &mut one.metadata));
        for (n, meta) in all.enumerate() {
            (meta.uid, meta.generation) = (Some(format!("u{n}")), Some(meta.generation.unwrap_or(1)));
        }
        objects
    }

    /// A mesh of so many members, all well.
    pub(crate) fn mesh(members: u16) -> Objects {
        let cluster = |n: u16| json!({"metadata": {"name": format!("m{n}")}, "spec": {"id": n}});
        objects((1..=members).map(cluster).collect(), json!([]))
    }

    pub(crate) fn sayings(objects: &Objects) -> BTreeMap<Subject, Saying> {
        said_with(objects, &BTreeMap::new())
    }

    fn said_with(objects: &Objects, reports: &BTreeMap<Ordinal, MeshGatewayStatus>) -> BTreeMap<Subject, Saying> {
        let me: MemberName = ME.parse().unwrap();
        let (mesh, mut rejected) = intent::mesh(objects, "mesh.internal");
        let local = Local { cluster: me.clone(), cidrs: Vec::new(), api_server: None };
        rejected.extend(Intent::new(&mesh, objects, &local).1);
        super::sayings(objects, &rejected, &me, reports)
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn report(reached: &[(&str, i64)]) -> MeshGatewayStatus {
        let members =
            reached.iter().map(|(name, gateways)| ReachedMember { name: (*name).to_owned(), gateways: *gateways });
        MeshGatewayStatus { members: members.collect(), ..MeshGatewayStatus::default() }
    }

    fn check(objects: &Objects, reports: &BTreeMap<Ordinal, MeshGatewayStatus>, expected: Expect) {
        let mut text = String::new();
        for (subject, saying) in said_with(objects, reports) {
            writeln!(text, "{:?} {}", subject.kind, subject.name).unwrap();
            let status = saying.due(at(7)).expect("nothing stands yet");
            for condition in status.conditions {
                let Condition { type_, status, reason, message, .. } = condition;
                writeln!(text, "  {type_}={status} {reason} {message:?}").unwrap();
            }
            for News { good, reason, note, about } in saying.news() {
                writeln!(text, "  {} {about} {reason}: {note}", if good { "event" } else { "warning" }).unwrap();
            }
        }
        expected.assert_eq(&text);
    }

    fn some() -> Objects {
        objects(
            json!([
                {"metadata": {"name": "m1"}, "spec": {"id": 1, "allowedCIDRs": ["10.1.0.0/16"]}},
                {"metadata": {"name": "m2"}, "spec": {"id": 2, "allowedCIDRs": ["10.2.0.0/16"]}},
                {"metadata": {"name": "m3"}, "spec": {"id": 2}},
            ]),
            json!([
                {"metadata": {"name": "m2"}, "spec": {"cluster": "m2", "routes": [{"cidr": "10.2.0.0/24", "type": "Pod"}]}},
                {"metadata": {"name": "m2.1"}, "spec": {"cluster": "m2", "routes": [
                    {"cidr": "10.2.1.0/24", "type": "Pod"}, {"cidr": "10.3.0.0/16", "type": "Pod"}]}},
                {"metadata": {"name": "m2.2"}, "spec": {"cluster": "m2", "routes":
                    (0..6).map(|n| json!({"cidr": format!("192.168.{n}.0/24"), "type": "Pod"})).collect::<Vec<_>>()}},
                {"metadata": {"name": "m4"}, "spec": {"cluster": "m4", "routes": [{"cidr": "10.4.0.0/16", "type": "Pod"}]}},
            ]),
        )
    }

    #[test]
    fn what_is_said_of_each_object() {
        check(
            &some(),
            &BTreeMap::new(),
            expect![[r#"
            MeshCluster m1
              Accepted=True Accepted ""
              Ready=True Accepted ""
            MeshCluster m2
              Accepted=True Accepted ""
              Connected=Unknown NoReport "no gateway of this cluster has reported yet"
              Ready=True Accepted ""
            MeshCluster m3
              Accepted=False DuplicateId "spec.id: DuplicateId: 2 is the id of m2, which comes first by name: give m3 an id of its own"
              Connected=Unknown NoReport "no gateway of this cluster has reported yet"
              Ready=False DuplicateId "spec.id: DuplicateId: 2 is the id of m2, which comes first by name: give m3 an id of its own"
              Stalled=True DuplicateId "spec.id: DuplicateId: 2 is the id of m2, which comes first by name: give m3 an id of its own"
              warning Accepted DuplicateId: spec.id: DuplicateId: 2 is the id of m2, which comes first by name: give m3 an id of its own
            RouteAdvertisement m2
              Accepted=True Accepted ""
              Ready=True Accepted ""
            RouteAdvertisement m2.1
              Accepted=False OutsideAllowed "spec.routes[1].cidr: OutsideAllowed: 10.3.0.0/16 lies in none of the allowedCIDRs of MeshCluster m2: have it added there"
              Ready=False OutsideAllowed "spec.routes[1].cidr: OutsideAllowed: 10.3.0.0/16 lies in none of the allowedCIDRs of MeshCluster m2: have it added there"
              Stalled=True OutsideAllowed "spec.routes[1].cidr: OutsideAllowed: 10.3.0.0/16 lies in none of the allowedCIDRs of MeshCluster m2: have it added there"
              warning Accepted OutsideAllowed: spec.routes[1].cidr: OutsideAllowed: 10.3.0.0/16 lies in none of the allowedCIDRs of MeshCluster m2: have it added there
            RouteAdvertisement m2.2
              Accepted=False OutsideAllowed "spec.routes[0].cidr: OutsideAllowed: 192.168.0.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[1].cidr: OutsideAllowed: 192.168.1.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[2].cidr: OutsideAllowed: 192.168.2.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[3].cidr: OutsideAllowed: 192.168.3.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; and 2 more: `carrick validate` tells more"
              Ready=False OutsideAllowed "spec.routes[0].cidr: OutsideAllowed: 192.168.0.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[1].cidr: OutsideAllowed: 192.168.1.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[2].cidr: OutsideAllowed: 192.168.2.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[3].cidr: OutsideAllowed: 192.168.3.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; and 2 more: `carrick validate` tells more"
              Stalled=True OutsideAllowed "spec.routes[0].cidr: OutsideAllowed: 192.168.0.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[1].cidr: OutsideAllowed: 192.168.1.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[2].cidr: OutsideAllowed: 192.168.2.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[3].cidr: OutsideAllowed: 192.168.3.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; and 2 more: `carrick validate` tells more"
              warning Accepted OutsideAllowed: spec.routes[0].cidr: OutsideAllowed: 192.168.0.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[1].cidr: OutsideAllowed: 192.168.1.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[2].cidr: OutsideAllowed: 192.168.2.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; spec.routes[3].cidr: OutsideAllowed: 192.168.3.0/24 lies in none of the allowedCIDRs of MeshCluster m2: have it added there; and 2 more: `carrick validate` tells more
            RouteAdvertisement m4
              Accepted=False UnknownCluster "spec.cluster: UnknownCluster: no MeshCluster named m4 is accepted: this waits until one is"
              Ready=False UnknownCluster "spec.cluster: UnknownCluster: no MeshCluster named m4 is accepted: this waits until one is"
              warning Accepted UnknownCluster: spec.cluster: UnknownCluster: no MeshCluster named m4 is accepted: this waits until one is
        "#]],
        );
    }

    #[test]
    fn a_member_is_connected_if_one_gateway_gets_an_answer() {
        let slots = |reports: &[MeshGatewayStatus]| Ordinal::all().zip(reports.iter().cloned()).collect();
        check(
            &mesh(2),
            &slots(&[report(&[("m2", 0)]), report(&[("m2", 1)])]),
            expect![[r#"
            MeshCluster m1
              Accepted=True Accepted ""
              Ready=True Accepted ""
            MeshCluster m2
              Accepted=True Accepted ""
              Connected=True Answers "through the gateways 1"
              Ready=True Accepted ""
        "#]],
        );
        check(
            &mesh(2),
            &slots(&[report(&[("m2", 0)]), report(&[])]),
            expect![[r#"
            MeshCluster m1
              Accepted=True Accepted ""
              Ready=True Accepted ""
            MeshCluster m2
              Accepted=True Accepted ""
              Connected=False NoAnswer "no answer through any of the gateways 0, 1: `carrick status` there says why"
              Ready=True Accepted ""
              warning Connected NoAnswer: no answer through any of the gateways 0, 1: `carrick status` there says why
        "#]],
        );
    }

    #[test]
    fn a_change_of_generation_is_said_and_is_no_transition() {
        let mut before = mesh(1);
        let status = sayings(&before).into_values().next().unwrap().due(at(7));
        before.clusters[0].status = status;
        before.clusters[0].metadata.generation = Some(2);
        let saying = sayings(&before).into_values().next().unwrap();
        let status = saying.due(at(9)).unwrap();
        assert_eq!(status.observed_generation, Some(2));
        for condition in status.conditions {
            assert_eq!((condition.last_transition_time.0, condition.observed_generation), (at(7), Some(2)));
        }
        assert_eq!(saying.news(), []);
    }

    proptest! {
        #[test]
        fn what_stands_is_not_written_again_and_times_are_those_of_transitions(
            reached in vec(vec(0..2i64, 0..3), 1..12),
        ) {
            let mut objects = some();
            let mut before: BTreeMap<(String, String), Condition> = BTreeMap::new();
            for (second, gateways) in reached.iter().enumerate() {
                let now = at(i64::try_from(second).unwrap());
                let reports = Ordinal::all().zip(gateways.iter().map(|links| report(&[("m2", *links)]))).collect();
                for (subject, saying) in said_with(&objects, &reports) {
                    let Some(status) = saying.due(now) else { continue };
                    for condition in &status.conditions {
                        let key = (subject.uid.clone(), condition.type_.clone());
                        let changed = before.get(&key).is_none_or(|before| before.status != condition.status);
                        let time = before.get(&key).filter(|_| !changed).map_or(now, |before| before.last_transition_time.0);
                        prop_assert_eq!(condition.last_transition_time.0, time);
                        before.insert(key, condition.clone());
                    }
                    let clusters = objects.clusters.iter_mut().map(|one| (&one.metadata, &mut one.status));
                    let others = objects.advertisements.iter_mut().map(|one| (&one.metadata, &mut one.status));
                    for (meta, stands) in clusters.chain(others) {
                        if meta.uid.as_ref() == Some(&subject.uid) {
                            *stands = Some(status.clone());
                        }
                    }
                }
                for (subject, saying) in said_with(&objects, &reports) {
                    prop_assert_eq!(saying.due(now), None, "{:?}", subject);
                    prop_assert_eq!(saying.news(), [], "{:?}", subject);
                }
            }
        }

        #[test]
        fn a_message_fits_into_an_event(refused in "\\PC{0,3000}") {
            let short = shortened(refused.clone());
            prop_assert!(short.len() <= LONGEST);
            prop_assert!(refused == short || refused.starts_with(short.strip_suffix(" ...").unwrap()));
        }
    }
}
