//! How workers, the rows of weights and memory are divided over NUMA nodes: pure arithmetic on
//! numbers of workers.
//!
//! ```text
//! workers   0 ..      a     | a ..      b       | …        those of a node are neighbours
//! rows      0 .. R·a/n ≈    | … .. R·b/n ≈      | …        cut at multiples of 32, R at the end
//! ```
//! A worker's share of a loop over rows lies in the rows of its node, and a matrix is stored in as
//! many parts as there are nodes, so each worker begins with weights that are near. With one node
//! all of this is an even division.

use serde::Serialize;
use std::ops::Range;

/// Rows of a matrix between two nodes are cut at multiples of this: of every unit in which rows are
/// dealt out, and of the groups in which layouts keep them.
pub const NODE_ROWS: usize = 32;

/// The nodes in use and their workers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeTeams {
    /// Nodes whose memory is used, in the order of their workers; none where memory is left to the
    /// system.
    nodes: Vec<u32>,
    /// The first worker of each node, and the number of workers; none where workers belong to no
    /// node.
    first_workers: Vec<usize>,
}

impl NodeTeams {
    /// Teams of workers whose nodes are given in the workers' order, those of a node side by side.
    /// One node alone is not divided.
    pub fn of_workers(nodes: &[u32]) -> Self {
        let runs: Vec<_> = nodes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect();
        if runs.len() < 2 {
            return Self::default();
        }
        let mut first_workers = vec![0];
        for (_, workers) in &runs {
            first_workers.push(first_workers[first_workers.len() - 1] + workers);
        }
        Self { nodes: runs.into_iter().map(|(node, _)| node).collect(), first_workers }
    }

    /// Memory of some nodes in turn, for workers that run on any of them. One node alone is left to
    /// the system.
    pub fn in_turn(nodes: Vec<u32>) -> Self {
        let nodes = if nodes.len() < 2 { Vec::new() } else { nodes };
        Self { nodes, first_workers: Vec::new() }
    }

    /// These teams if they are of so many workers, else one of all.
    pub fn of_all(self, workers: usize) -> Self {
        match self.first_workers.last() {
            Some(all) if *all != workers => Self::default(),
            _ => self,
        }
    }

    /// These teams with one worker less of `workers`, and which one is gone: the last of the team
    /// of `node`, if it has another, else of the largest.
    pub(super) fn one_less(&self, workers: usize, node: Option<u32>) -> (Self, usize) {
        if !self.are_divided() {
            return (self.clone(), workers - 1);
        }
        let size = |team: usize| self.workers(team, workers).len();
        let wanted = self.nodes.iter().position(|known| Some(*known) == node);
        let largest = (0..self.count()).max_by_key(|team| (size(*team), *team)).unwrap_or(0);
        let team = wanted.filter(|team| size(*team) > 1).unwrap_or(largest);
        let nodes = (0..self.count()).flat_map(|at| {
            let left = size(at) - usize::from(at == team);
            std::iter::repeat_n(self.nodes[at], left)
        });
        let nodes: Vec<u32> = nodes.collect();
        (Self::of_workers(&nodes), self.first_workers[team + 1] - 1)
    }

    /// How many teams there are, at least 1.
    pub fn count(&self) -> usize {
        self.first_workers.len().saturating_sub(1).max(1)
    }

    /// Whether there are several teams.
    pub fn are_divided(&self) -> bool {
        !self.first_workers.is_empty()
    }

    /// Nodes whose memory is used; none where it is left to the system.
    pub fn nodes(&self) -> &[u32] {
        &self.nodes
    }

    /// The workers of a team, of so many in all.
    pub fn workers(&self, team: usize, all: usize) -> Range<usize> {
        if self.are_divided() {
            self.first_workers[team]..self.first_workers[team + 1]
        } else {
            0..all
        }
    }

    /// The team of a worker.
    pub fn team_of(&self, worker: usize) -> usize {
        self.first_workers.iter().skip(1).take_while(|first| **first <= worker).count()
    }

    /// The rows of a matrix of `rows` rows that lie on the node of a team, and that its workers
    /// begin with.
    pub fn rows(&self, team: usize, rows: usize) -> Range<usize> {
        self.first_row(team, rows)..self.first_row(team + 1, rows)
    }

    fn first_row(&self, team: usize, rows: usize) -> usize {
        if team == 0 || team >= self.count() {
            return if team == 0 { 0 } else { rows };
        }
        let even = rows * self.first_workers[team] / self.first_workers[self.count()];
        ((even + NODE_ROWS / 2) / NODE_ROWS * NODE_ROWS).min(rows)
    }

    /// Where the share of worker `worker` of `all` begins in a loop over `rows` rows, in units of
    /// `unit` rows, a divisor of [`NODE_ROWS`]; of worker `all`, where the last share ends.
    pub fn first_unit(&self, (worker, all): (usize, usize), (rows, unit): (usize, usize)) -> usize {
        if worker >= all {
            return rows.div_ceil(unit);
        }
        let team = self.team_of(worker);
        let (workers, rows) = (self.workers(team, all), self.rows(team, rows));
        let units = rows.len().div_ceil(unit);
        rows.start.div_ceil(unit) + units * (worker - workers.start) / workers.len()
    }

    /// How many of `bytes` lie on a node, by its position in [`NodeTeams::nodes`].
    ///
    /// # Panics
    /// When there is no such node.
    pub fn portion(&self, index: usize, bytes: u64) -> u64 {
        match self.first_workers.last() {
            Some(all) => bytes * self.workers(index, *all).len() as u64 / *all as u64,
            None => bytes / self.nodes.len() as u64,
        }
    }
}
