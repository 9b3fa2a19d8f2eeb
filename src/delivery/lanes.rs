//! Serving the lanes: a task for each delivery, until the worker stops.
//! Guarantee: at most the lane's prefetch of tasks run at once, and a lane that has been stopped waits for its tasks.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::database::{DatabaseState, DatabaseWatch};
use super::in_hand::ServedLane;
use super::worker::Worker;
use crate::broker::Broker;
use crate::broker::Deliveries;
use crate::shutdown::Shutdown;

/// Serves one lane until its deliveries end, then waits for those in hand.
pub async fn serve(worker: Arc<Worker>, lane: ServedLane, mut deliveries: Deliveries) {
    let lane = Arc::new(lane);
    let mut tasks = JoinSet::new();
    loop {
        // Unbiased: under a steady load the ended tasks would otherwise stay in memory.
        tokio::select! {
            delivery = deliveries.next() => match delivery {
                Some(delivery) => {
                    let (worker, lane) = (worker.clone(), lane.clone());
                    tasks.spawn(async move { worker.handle(delivery, &lane).await });
                }
                None => break,
            },
            Some(ended) = tasks.join_next() => report(ended),
        }
    }
    while let Some(ended) = tasks.join_next().await {
        report(ended);
    }
}

/// A panic beyond everything that settles a delivery after one: it went back to the lane when it was dropped.
fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!("a delivery's task panicked; the delivery goes back to its lane");
    }
}

/// Pauses the lanes while the database is away: without a claim nothing may be sent.
pub async fn pause_without_database(broker: Arc<Broker>, database: DatabaseWatch, shutdown: Shutdown) {
    let mut state = database.subscribe();
    loop {
        match &*state.borrow_and_update() {
            DatabaseState::Up => broker.resume_lanes(),
            DatabaseState::Away(_) => broker.pause_lanes(),
        }
        tokio::select! {
            () = shutdown.stop_taking() => return,
            changed = state.changed() => if changed.is_err() { return },
        }
    }
}
