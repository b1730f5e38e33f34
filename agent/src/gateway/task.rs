//! The task that asks the API server what [`Gateway`] wants asked.

use std::time::Duration;

use tokio::{
    sync::watch::{Receiver, Sender, channel},
    time::{Instant, sleep},
};
use tracing::info;

use super::{Answer, Ask, Gateway, Known, Said, api::Server};
use crate::source::{self, send_news};

/// How often it is seen whether something is due.
const TICK: Duration = Duration::from_secs(1);

/// Asks for as long as somebody listens. Nothing is asked, and no connection made, before there is something to ask.
///
/// Must be called within a tokio runtime.
pub fn follow(server: source::Server, mut gateway: Gateway) -> (Sender<Known>, Receiver<Said>) {
    let (sender, mut known) = channel(Known::default());
    let (say, said) = channel(Said::default());
    tokio::spawn(async move {
        let began = Instant::now();
        let mut api: Option<Server> = None;
        // What a node is that nothing is known of yet, is not for us to say.
        while known.changed().await.is_ok() {
            loop {
                let news = known.borrow_and_update().clone();
                gateway.know(began.elapsed(), news);
                let ask = gateway.next(began.elapsed());
                send_news(&say, gateway.said());
                if say.is_closed() {
                    return;
                }
                let Some(ask) = ask else { break };
                let sent = began.elapsed();
                let answer = answer(&mut api, &server, &gateway, &ask).await;
                gateway.answered(sent, began.elapsed(), &ask, answer);
            }
            tokio::select! {
                // Seen again above, by `changed`.
                changed = known.changed() => if changed.is_err() { return },
                () = sleep(TICK) => {}
            }
            known.mark_changed();
        }
    });
    (sender, said)
}

async fn answer(api: &mut Option<Server>, server: &source::Server, gateway: &Gateway, ask: &Ask) -> Answer {
    if api.is_none() {
        match server.client().await {
            Ok(client) => *api = Some(Server::new(client, gateway.me.clone())),
            Err(error) => return Answer::Failed(error.to_string()),
        }
    }
    let Some(api) = api else { return Answer::Failed("there is no client".to_owned()) };
    let answer = api.answer(ask).await;
    match (ask, &answer) {
        (Ask::Apply(spec), Answer::Done) => info!(slot = spec.ordinal, key = spec.public_key, "MeshGateway written"),
        (Ask::Remove(slot), Answer::Done) => info!(%slot, "MeshGateway of the slot before deleted"),
        _ => {}
    }
    answer
}
