//! The lineage of a journal: its branches, and what of each is still the journal's. A journal that was restored to an
//! older copy goes on in a new branch, which shares with its parent everything up to the position at which it left.
//!
//! The invariant: [`Lineage::fits`] takes a position for the journal's own only if every event up to there is in the
//! journal. The first branch has the identifier of the journal, so that events and checkpoints of a time before there
//! were branches, which name none, belong to it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

const JOURNAL: &str = "journal";
const BRANCH: &str = "branch";
const LINEAGE: &str = "lineage";
const HEAD: &str = "head";

/// A branch of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    #[serde(rename = "branch")]
    pub id: Uuid,
    /// The branch that it has left; `None` for the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
    /// The last position that it shares with its parent; 0 for the first one.
    pub position: u64,
}

/// The branches of one journal, and which of them it goes on in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    journal: Uuid,
    /// Parents before their children.
    branches: Vec<Branch>,
    /// The branch that the journal goes on in, its parent, and so on up to the first.
    path: Vec<Segment>,
}

/// A branch on the way from the first to the present one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    branch: Uuid,
    /// The last position that it shares with its parent.
    left_at: u64,
    /// The last position up to which its events are the journal's.
    ours_up_to: u64,
}

/// Whether what was built from a branch up to a position is part of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    Ours,
    /// The journal has left that branch at the position `fork`, and gone on in the branch `ours`.
    BeyondFork {
        fork: u64,
        ours: Uuid,
    },
    /// The journal has no such branch.
    UnknownBranch,
    OtherJournal,
}

/// Branches that are no lineage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lineage of the journal cannot be read: {0}")]
pub struct InvalidLineage(String);

impl Lineage {
    /// The lineage of a journal that goes on in the branch `present`. Parents stand before their children.
    ///
    /// # Errors
    /// If the first branch is not the journal's, or if a branch comes twice or before its parent.
    pub fn new(journal: Uuid, present: Uuid, branches: Vec<Branch>) -> Result<Self, InvalidLineage> {
        let invalid = |branch: Uuid, reason: &str| Err(InvalidLineage(format!("the branch {branch} {reason}")));
        for (index, Branch { id, parent, position }) in branches.iter().enumerate() {
            let before = &branches[..index];
            let is_known = |id: &Uuid| before.iter().any(|branch| branch.id == *id);
            match parent {
                _ if is_known(id) => return invalid(*id, "comes twice"),
                None if index > 0 || *id != journal || *position > 0 => return invalid(*id, "has no parent"),
                Some(parent) if !is_known(parent) => return invalid(*id, "has an unknown parent"),
                None | Some(_) => {}
            }
        }
        let find = |id: Uuid| branches.iter().find(|branch| branch.id == id);
        let (mut path, mut ours_up_to, mut next) = (Vec::new(), u64::MAX, Some(present));
        while let Some(id) = next {
            let Some(Branch { parent, position, .. }) = find(id) else { return invalid(id, "is unknown") };
            path.push(Segment { branch: id, left_at: *position, ours_up_to });
            (ours_up_to, next) = (ours_up_to.min(*position), *parent);
        }
        Ok(Self { journal, branches, path })
    }

    pub fn journal(&self) -> Uuid {
        self.journal
    }

    /// The branch that the journal goes on in.
    pub fn present(&self) -> Uuid {
        self.path[0].branch
    }

    pub fn branches(&self) -> &[Branch] {
        &self.branches
    }

    /// The branch that the event at a position belongs to.
    pub fn branch_at(&self, position: u64) -> Uuid {
        let has_it = |segment: &&Segment| segment.left_at < position;
        self.path.iter().find(has_it).map_or(self.journal, |segment| segment.branch)
    }

    /// Whether what was built from this branch of this journal, up to the position, is part of this journal.
    pub fn fits(&self, journal: Uuid, branch: Uuid, position: u64) -> Fit {
        if journal != self.journal {
            return Fit::OtherJournal;
        }
        // Up from the branch to one that the journal has gone through.
        let (mut branch, mut shared) = (branch, u64::MAX);
        let fork = loop {
            if let Some(segment) = self.path.iter().find(|segment| segment.branch == branch) {
                break shared.min(segment.ours_up_to);
            }
            let left = self.branches.iter().find(|known| known.id == branch);
            let Some(Branch { parent: Some(parent), position, .. }) = left else { return Fit::UnknownBranch };
            (branch, shared) = (*parent, shared.min(*position));
        };
        if position <= fork { Fit::Ours } else { Fit::BeyondFork { fork, ours: self.branch_at(fork + 1) } }
    }

    /// What a stream's metadata say of the journal whose events it holds, which was at the position `head` when the
    /// stream was made.
    pub fn to_metadata(&self, head: u64) -> HashMap<String, String> {
        let lineage = serde_json::to_string(&self.branches).unwrap_or_default();
        let entries = [
            (JOURNAL, self.journal.to_string()),
            (BRANCH, self.present().to_string()),
            (LINEAGE, lineage),
            (HEAD, head.to_string()),
        ];
        entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Reads a stream's metadata; `None` if they do not name a journal, as in streams from before there were branches.
    ///
    /// # Errors
    /// If they name a journal, but not its lineage.
    pub fn from_metadata(metadata: &HashMap<String, String>) -> Result<Option<Self>, InvalidLineage> {
        let Some(journal) = metadata.get(JOURNAL) else { return Ok(None) };
        let invalid = |name: &str| InvalidLineage(format!("the stream's metadata {name:?} is missing or not valid"));
        let uuid = |name, text: Option<&String>| text.and_then(|text| text.parse().ok()).ok_or_else(|| invalid(name));
        let (journal, present) = (uuid(JOURNAL, Some(journal))?, uuid(BRANCH, metadata.get(BRANCH))?);
        let branches = metadata.get(LINEAGE).and_then(|json| serde_json::from_str(json).ok());
        Self::new(journal, present, branches.ok_or_else(|| invalid(LINEAGE))?).map(Some)
    }
}

/// The position at which the journal was when the stream with these metadata was made; `None` if they do not tell.
pub fn head_from_metadata(metadata: &HashMap<String, String>) -> Option<u64> {
    metadata.get(HEAD)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const JOURNAL: Uuid = Uuid::from_u128(1);

    fn id(number: usize) -> Uuid {
        Uuid::from_u128(number as u128 + 1)
    }

    fn branch(number: usize, parent: usize, position: u64) -> Branch {
        Branch { id: id(number), parent: Some(id(parent)), position }
    }

    fn first() -> Branch {
        Branch { id: JOURNAL, parent: None, position: 0 }
    }

    #[test]
    fn a_journal_that_was_restored_keeps_what_it_shares_with_its_parent() {
        let lineage = Lineage::new(JOURNAL, id(1), vec![first(), branch(1, 0, 5)]).unwrap();
        assert_eq!((lineage.branch_at(5), lineage.branch_at(6)), (JOURNAL, id(1)));
        assert_eq!(lineage.fits(JOURNAL, JOURNAL, 5), Fit::Ours);
        assert_eq!(lineage.fits(JOURNAL, JOURNAL, 6), Fit::BeyondFork { fork: 5, ours: id(1) });
        assert_eq!(lineage.fits(JOURNAL, id(1), 99), Fit::Ours);
        assert_eq!(lineage.fits(JOURNAL, id(2), 1), Fit::UnknownBranch);
        assert_eq!(lineage.fits(id(7), JOURNAL, 1), Fit::OtherJournal);
    }

    #[test]
    fn a_branch_that_the_journal_has_not_gone_through_shares_what_its_parent_does() {
        // The journal was restored to a copy from before it went on in branch 1.
        let lineage = Lineage::new(JOURNAL, id(2), vec![first(), branch(1, 0, 5), branch(2, 0, 3)]).unwrap();
        assert_eq!(lineage.fits(JOURNAL, id(1), 3), Fit::Ours);
        assert_eq!(lineage.fits(JOURNAL, id(1), 7), Fit::BeyondFork { fork: 3, ours: id(2) });
        // It leaves branch 1 before that had left the first one.
        let lineage = Lineage::new(JOURNAL, id(2), vec![first(), branch(1, 0, 5), branch(2, 1, 3)]).unwrap();
        assert_eq!((lineage.branch_at(3), lineage.branch_at(4)), (JOURNAL, id(2)));
        assert_eq!(lineage.fits(JOURNAL, id(1), 4), Fit::BeyondFork { fork: 3, ours: id(2) });
    }

    #[test]
    fn metadata_are_read_back_as_they_were_written() {
        let lineage = Lineage::new(JOURNAL, id(1), vec![first(), branch(1, 0, 5)]).unwrap();
        let mut metadata = lineage.to_metadata(7);
        assert_eq!(head_from_metadata(&metadata), Some(7));
        // The server adds metadata of its own.
        metadata.insert("_nats.level".to_owned(), "1".to_owned());
        assert_eq!(Lineage::from_metadata(&metadata), Ok(Some(lineage)));
        for name in ["branch", "lineage"] {
            let mut metadata = metadata.clone();
            metadata.remove(name);
            assert!(Lineage::from_metadata(&metadata).is_err(), "{name}");
            metadata.insert(name.to_owned(), "x".to_owned());
            assert!(Lineage::from_metadata(&metadata).is_err(), "{name}");
        }
        metadata.remove("journal");
        assert_eq!(Lineage::from_metadata(&metadata), Ok(None));
    }

    #[test]
    fn what_is_no_tree_of_branches_is_no_lineage() {
        let other = Branch { id: id(1), parent: None, position: 0 };
        for (present, branches) in [
            (JOURNAL, vec![]),
            (id(1), vec![first()]),
            (JOURNAL, vec![first(), first()]),
            (JOURNAL, vec![first(), other.clone()]),
            (id(1), vec![other]),
            (JOURNAL, vec![branch(1, 0, 5), first()]),
            (JOURNAL, vec![first(), branch(1, 1, 5)]),
        ] {
            assert!(Lineage::new(JOURNAL, present, branches.clone()).is_err(), "{branches:?}");
        }
    }

    /// A branch that leaves one of those before it, the positions that it keeps of it, and how many events it gets.
    fn steps() -> impl Strategy<Value = Vec<(prop::sample::Index, prop::sample::Index, u64)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1_u64..6), 0..8)
    }

    proptest! {
        /// Each branch is modelled as the list of its events.
        #[test]
        fn only_positions_up_to_which_all_events_are_the_journal_s_fit(
            begun in 1_u64..8, steps in steps(), present in any::<prop::sample::Index>(),
        ) {
            let mut branches = vec![first()];
            let mut histories: Vec<Vec<(usize, u64)>> = vec![(1..=begun).map(|position| (0, position)).collect()];
            for (number, (parent, kept, added)) in (1..).zip(steps) {
                let parent = parent.index(branches.len());
                let kept = kept.index(histories[parent].len() + 1);
                branches.push(branch(number, parent, kept as u64));
                let own = (1..=added).map(|offset| (number, kept as u64 + offset));
                let history = histories[parent][..kept].iter().copied().chain(own).collect();
                histories.push(history);
            }
            let present = present.index(branches.len());
            let ours = &histories[present];
            let lineage = Lineage::new(JOURNAL, id(present), branches).unwrap();
            for (position, (number, _)) in (1..).zip(ours) {
                prop_assert_eq!(lineage.branch_at(position), id(*number));
            }
            for (number, history) in histories.iter().enumerate() {
                for position in 1..=history.len() {
                    let is_ours = ours.get(..position) == Some(&history[..position]);
                    let fit = lineage.fits(JOURNAL, id(number), position as u64);
                    prop_assert_eq!(fit == Fit::Ours, is_ours, "{} of branch {}", position, number);
                    if let Fit::BeyondFork { fork, .. } = fit {
                        prop_assert_eq!(lineage.fits(JOURNAL, id(number), fork), Fit::Ours);
                    }
                }
            }
            prop_assert_eq!(Lineage::from_metadata(&lineage.to_metadata(7)), Ok(Some(lineage)));
        }
    }
}
