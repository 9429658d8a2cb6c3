//! The protocol holds with all rules, and each rule is needed: dropping it alone shows the fault it prevents.
//!
//! Invariant: a search that was cut short proves nothing, so every test asks that its search was complete or found its fault.

use std::collections::HashSet;

use model::rules::Rule;
use model::rules::Rules;
use model::safety::Fault;
use model::search::Found;
use model::search::Wish;
use model::state::CRASHES_ANY;
use model::state::Shape;
use model::state::State;
use model::step::Machine;
use model::words;

const TWO_PROXIES: Shape = Shape { known: 2, strangers: 0, epochs: 2, crashes: CRASHES_ANY };
/// About 1 GB; the largest search here needs a fifth.
const STATES_MAX: usize = 20_000_000;

fn search(shape: Shape, dropped: &[Rule], until: Option<Fault>) -> Found {
    Machine { shape, rules: Rules::without(dropped) }.search(Wish { states_max: STATES_MAX, until })
}

fn holds(shape: Shape, states_min: usize) {
    let found = search(shape, &[], None);
    let stories = found.faults.iter().map(|(fault, trace)| {
        let lines: Vec<_> = trace.iter().map(|(step, after)| words::line(*step, after)).collect();
        format!("{fault}\n{}", lines.join("\n"))
    });
    assert!(found.faults.is_empty(), "{}", stories.collect::<Vec<_>>().join("\n"));
    assert!(found.complete, "the search was cut short");
    assert!(found.states >= states_min, "only {} states: the model lost some of its behaviour", found.states);
}

fn needs(dropped: &[Rule], fault: Fault) {
    let found = search(TWO_PROXIES, dropped, Some(fault));
    let seen: Vec<_> = found.faults.iter().map(|(fault, trace)| (fault, trace.len())).collect();
    assert!(seen.iter().any(|(kind, _)| **kind == fault), "without {dropped:?} only {seen:?}");
}

#[test]
fn two_proxies_two_epochs_any_number_of_crashes_keep_one_side_and_never_stick() {
    holds(TWO_PROXIES, 200_000);
}

#[test]
fn two_proxies_two_epochs_four_crashes_keep_one_side_and_never_stick() {
    holds(Shape { crashes: 4, ..TWO_PROXIES }, 700_000);
}

#[test]
fn a_proxy_that_the_controller_does_not_know_takes_no_write_to_the_loser_and_finds_its_way() {
    holds(Shape { strangers: 1, ..TWO_PROXIES }, 2_000_000);
}

#[test]
fn three_epochs_there_and_back_and_there_again_keep_one_side_and_never_stick() {
    holds(Shape { epochs: 3, ..TWO_PROXIES }, 6_000_000);
}

#[test]
fn a_fence_that_opens_by_time_makes_two_sides() {
    needs(&[Rule::R1], Fault::TwoSides);
}

#[test]
fn a_late_flip_or_unfence_that_acts_makes_two_sides() {
    needs(&[Rule::R3], Fault::TwoSides);
}

#[test]
fn a_late_guard_that_acts_makes_two_sides() {
    needs(&[Rule::R3Guard], Fault::TwoSides);
}

#[test]
fn an_epoch_opened_over_an_undecided_one_sticks() {
    needs(&[Rule::R4], Fault::Stuck);
}

#[test]
fn an_epoch_opened_where_a_commit_left_makes_two_sides() {
    needs(&[Rule::R4Side], Fault::TwoSides);
}

#[test]
fn source_and_target_taken_for_each_other_make_two_sides() {
    needs(&[Rule::R4Active], Fault::TwoSides);
}

#[test]
fn without_the_barrier_a_writer_that_passed_the_gate_makes_two_sides() {
    needs(&[Rule::R5], Fault::TwoSides);
}

#[test]
fn a_resume_without_proof_serves_the_loser() {
    needs(&[Rule::R7], Fault::LoserServed);
}

#[test]
fn a_lease_that_ends_without_a_decision_serves_the_loser() {
    needs(&[Rule::R8], Fault::LoserServed);
}

#[test]
fn a_hold_at_start_up_without_a_lease_sticks() {
    needs(&[Rule::R8StartUp], Fault::Stuck);
}

#[test]
fn proxies_that_do_not_look_stick() {
    needs(&[Rule::R9], Fault::Stuck);
}

#[test]
fn a_target_that_opens_before_the_evidence_makes_two_sides() {
    needs(&[Rule::R10], Fault::TwoSides);
}

#[test]
fn a_switch_without_evidence_sticks_on_the_way_back() {
    needs(&[Rule::R10Witness], Fault::Stuck);
}

/// R2 and the refusal of stale PAUSEs are each dispensable here (the second no longer is with three epochs).
#[test]
fn aborts_that_are_no_decision_are_caught_by_the_other_rules() {
    let found = search(TWO_PROXIES, &[Rule::R2], None);
    assert!(found.complete && found.faults.is_empty());
    let found = search(TWO_PROXIES, &[Rule::R7Pause], None);
    assert!(found.complete && found.faults.is_empty());
}

/// A model whose transitions can not fire proves nothing.
#[test]
fn every_verb_is_taken_and_a_rollback_comes_back_into_service() {
    let shape = Shape { known: 1, strangers: 1, epochs: 2, crashes: 1 };
    let machine = Machine { shape, rules: Rules::all() };
    let (mut verbs, mut back) = (HashSet::new(), false);
    let mut seen = HashSet::from([State::first(1).pack()]);
    let mut todo = vec![State::first(1)];
    let mut next = Vec::new();
    while let Some(state) = todo.pop() {
        assert_eq!(State::unpack(state.pack()), state);
        let commits = state.epochs.iter().filter(|epoch| epoch.evidence).count();
        back |= commits == 2 && machine.in_service(&state) && state.proxies[0].route_epoch == 2;
        machine.successors(&state, &mut next);
        for (step, after) in &next {
            verbs.insert(format!("{step:?}").replace(char::is_numeric, "_"));
            if seen.insert(after.pack()) {
                todo.push(*after);
            }
        }
    }
    assert!(back, "no way there and back");
    // 10 of a proxy, 9 of the controller (Open on two sides, Closed only without R4), 5 arrivals, 5 of the writer.
    assert_eq!(verbs.len(), 29, "{verbs:#?}");
}
