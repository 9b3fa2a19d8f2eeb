//! The last look before DATA, in batches.
//! Guarantee: `Open` was true of the row at some moment after the question; the mark is written only on the owner's claim.

use std::collections::HashSet;
use std::sync::Arc;

use sqlx::{PgConnection, Row};

use super::super::batch::Work;
use super::super::{Store, StoreError};
use super::grants::{Grants, Token};
use super::{RowKey, organization_text, row_key, without_nul};
use crate::model::ledger::{Gate, GateAnswer};

const LOOK: &str = "
SELECT a.position, groups.sequence,
    coalesce(j.state = 'claimed' AND j.owner = a.owner AND j.turn = a.turn, false) AS owned,
    coalesce(j.cancel_requested, false) OR coalesce(groups.cancelled = a.sequence, false) AS cancelled
FROM unnest($1::text[], $2::uuid[], $3::int[], $4::int[], $5::text[], $6::bigint[])
    WITH ORDINALITY AS a (organization_id, id, owner, turn, group_name, sequence, position)
LEFT JOIN jobs AS j ON j.id = a.id AND j.organization_id = a.organization_id
LEFT JOIN job_groups AS groups ON groups.organization_id = a.organization_id AND groups.name = a.group_name
ORDER BY a.position";

/// The lateral subselect locks the rows one by one in the order of the arrays.
const MARK: &str = "
WITH locked AS MATERIALIZED (
    SELECT a.organization_id, a.id, a.position
    FROM unnest($1::text[], $2::uuid[], $3::int[], $4::int[])
        WITH ORDINALITY AS a (organization_id, id, owner, turn, position)
    CROSS JOIN LATERAL (
        SELECT state, owner, turn FROM jobs
        WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id
        FOR NO KEY UPDATE
    ) AS j
    WHERE j.state = 'claimed' AND j.owner = a.owner AND j.turn = a.turn
)
UPDATE jobs SET committing = true FROM locked
WHERE jobs.id = locked.id AND jobs.organization_id = locked.organization_id
RETURNING locked.position";

pub(super) struct GateRequest {
    pub(super) gate: Gate,
    pub(super) token: Option<Token>,
}

pub(super) struct Gates {
    pub(super) store: Store,
    pub(super) grants: Arc<Grants>,
}

impl Work for Gates {
    type Key = RowKey;
    type Request = GateRequest;
    type Answer = GateAnswer;
    /// A gate that nobody waits at lets nobody through.
    const SKIP_ABANDONED: bool = true;

    fn key(request: &GateRequest) -> RowKey {
        row_key(&request.gate.key)
    }

    async fn run(&self, requests: &[&GateRequest]) -> Result<Vec<Option<GateAnswer>>, StoreError> {
        let gates: Vec<&Gate> = requests.iter().map(|request| &request.gate).collect();
        let answers = self.store.on_session(async |session| answer(session, &gates).await).await?;
        for (request, answer) in requests.iter().zip(&answers) {
            if *answer == GateAnswer::NotOwner {
                self.grants.end(&request.gate.key, request.token);
            }
        }
        Ok(answers.into_iter().map(Some).collect())
    }

    fn undelivered(&self, _: GateRequest, _: GateAnswer) {}
}

async fn answer(session: &mut PgConnection, gates: &[&Gate]) -> Result<Vec<GateAnswer>, sqlx::Error> {
    let mut answers = look(session, gates).await?;
    let marking: Vec<usize> = gates
        .iter()
        .enumerate()
        .filter(|(position, gate)| gate.commit && answers[*position] == GateAnswer::Open)
        .map(|(position, _)| position)
        .collect();
    if !marking.is_empty() {
        let marked =
            mark(session, &marking.iter().map(|position| gates[*position]).collect::<Vec<_>>()).await?;
        for (order, position) in marking.into_iter().enumerate() {
            if !marked.contains(&order) {
                answers[position] = GateAnswer::NotOwner;
            }
        }
    }
    Ok(answers)
}

async fn look(session: &mut PgConnection, gates: &[&Gate]) -> Result<Vec<GateAnswer>, sqlx::Error> {
    let groups: Vec<_> = gates
        .iter()
        .map(|gate| gate.revision.as_ref().map(|revision| without_nul(&revision.group).into_owned()))
        .collect();
    let rows = sqlx::query(LOOK)
        .bind(gates.iter().map(|gate| organization_text(&gate.key)).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.key.id).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.owner.0).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.turn.0).collect::<Vec<_>>())
        .bind(groups)
        .bind(gates.iter().map(|gate| gate.revision.as_ref().map(|own| own.sequence)).collect::<Vec<_>>())
        .fetch_all(session)
        .await?;
    rows.iter()
        .zip(gates)
        .map(|(row, gate)| {
            let newest: Option<i64> = row.try_get("sequence")?;
            let newer = newest.filter(|by| gate.revision.as_ref().is_some_and(|own| own.sequence < *by));
            Ok(match newer {
                _ if !row.try_get::<bool, _>("owned")? => GateAnswer::NotOwner,
                _ if row.try_get("cancelled")? => GateAnswer::Cancelled,
                Some(by) => GateAnswer::Superseded { by },
                None => GateAnswer::Open,
            })
        })
        .collect()
}

/// The positions whose rows are marked.
async fn mark(session: &mut PgConnection, gates: &[&Gate]) -> Result<HashSet<usize>, sqlx::Error> {
    let positions: Vec<i64> = sqlx::query_scalar(MARK)
        .bind(gates.iter().map(|gate| organization_text(&gate.key)).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.key.id).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.owner.0).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.turn.0).collect::<Vec<_>>())
        .fetch_all(session)
        .await?;
    Ok(positions.into_iter().filter_map(|position| usize::try_from(position - 1).ok()).collect())
}
