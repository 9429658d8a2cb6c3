//! The protocol holds with all rules, and each rule is needed: dropping it alone shows the fault it prevents.
//!
//! Invariant: a search that was cut short proves nothing, so every test asks that its search was complete or found its fault.

use std::collections::HashSet;

use model::rules::Rule;
use model::rules::Rules;
use model::safety::Fault;
use model::search::Found;
use model::search::Wish;
use model::state::Cut;
use model::state::Network;
use model::state::Phase;
use model::state::Shape;
use model::state::Side;
use model::state::State;
use model::step::Machine;
use model::step::Step;
use model::words;

const BASE: Shape = Shape::BASE;
const TWO: Shape = Shape { listed: 2, ..BASE };
const ONE_CUT: Shape = Shape { listed: 1, network: Network::Cuts, ..BASE };
/// About half a GB; the largest search here needs a tenth.
const STATES_MAX: usize = 15_000_000;

fn search(shape: Shape, dropped: &[Rule], until: Option<Fault>) -> Found {
    let wish = Wish { states_max: STATES_MAX, until, progress: &|_, _| {} };
    Machine { shape, rules: Rules::without(dropped) }.search(wish)
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

fn needs(rule: Rule, shape: Shape, fault: Fault) {
    let found = search(shape, &[rule], Some(fault));
    let seen: Vec<_> = found.faults.iter().map(|(fault, trace)| (fault, trace.len())).collect();
    let trace = found.faults.iter().find(|(kind, _)| *kind == fault).map(|(_, trace)| trace);
    let trace = trace.unwrap_or_else(|| panic!("without {rule} only {seen:?}"));
    // The story is told whole, from the first state to the bad one.
    let machine = Machine { shape, rules: Rules::without(&[rule]) };
    let last = trace.last().map_or(machine.first(), |(_, last)| *last);
    assert!(fault.needs_all() || machine.faults(&last).any(|kind| kind == fault), "the trace of {fault} breaks off");
}

#[test]
fn two_proxies_two_epochs_any_number_of_crashes_keep_one_side_and_never_stick() {
    holds(TWO, 150_000);
}

#[test]
fn two_proxies_two_epochs_two_crashes_keep_one_side_and_never_stick() {
    holds(Shape { crashes: 2, ..TWO }, 250_000);
}

#[test]
fn three_epochs_there_and_back_and_there_again_keep_one_side_and_never_stick() {
    holds(Shape { listed: 1, epochs: 3, ..BASE }, 200_000);
}

#[test]
fn a_member_that_nobody_listed_and_a_proxy_that_nobody_knows_keep_one_side_and_find_their_way() {
    holds(Shape { members: 1, strangers: 1, ..BASE }, 150_000);
}

#[test]
fn a_proxy_cut_off_from_one_server_keeps_one_side_and_finds_its_way_if_it_reaches_the_owner() {
    holds(ONE_CUT, 100_000);
}

#[test]
fn data_goes_there_and_back_and_no_acknowledged_write_is_lost() {
    holds(Shape { data: true, ..TWO }, 300_000);
}

#[test]
fn a_fence_that_opens_by_time_makes_two_sides() {
    needs(Rule::R1, TWO, Fault::TwoSides);
}

#[test]
fn a_late_flip_or_unfence_that_acts_makes_two_sides() {
    needs(Rule::R3, TWO, Fault::TwoSides);
}

#[test]
fn a_late_guard_that_acts_makes_two_sides() {
    needs(Rule::R3Guard, TWO, Fault::TwoSides);
}

#[test]
fn an_epoch_opened_over_an_undecided_one_sticks() {
    needs(Rule::R4, TWO, Fault::Stuck);
}

#[test]
fn an_epoch_opened_where_a_commit_left_makes_two_sides() {
    needs(Rule::R4Side, TWO, Fault::TwoSides);
}

#[test]
fn source_and_target_taken_for_each_other_stick() {
    needs(Rule::R4Active, TWO, Fault::Stuck);
}

#[test]
fn without_the_barrier_a_writer_that_passed_the_gate_makes_two_sides() {
    needs(Rule::R5, TWO, Fault::TwoSides);
}

#[test]
fn a_resume_without_proof_serves_the_loser() {
    needs(Rule::R7, TWO, Fault::LoserServed);
}

/// Found by the model: a hold of epoch 1 that could not follow, an order of a run long dead, and a rollback meanwhile.
#[test]
fn a_switch_to_a_side_where_a_newer_epoch_is_open_serves_the_loser() {
    needs(Rule::R7Newest, ONE_CUT, Fault::LoserServed);
}

#[test]
fn a_lease_that_ends_without_a_decision_serves_the_loser() {
    needs(Rule::R8, TWO, Fault::LoserServed);
}

#[test]
fn a_hold_at_start_up_without_a_lease_sticks() {
    needs(Rule::R8StartUp, TWO, Fault::Stuck);
}

#[test]
fn a_held_proxy_that_only_asks_a_silent_source_is_stranded() {
    needs(Rule::R8Evidence, ONE_CUT, Fault::Stranded);
}

/// Found by the model: it missed the abort of its epoch, or the target it waits for lost the database in turn.
#[test]
fn a_held_proxy_that_heeds_no_newer_commit_is_stranded() {
    needs(Rule::R8Newer, Shape { members: 1, network: Network::Cuts, ..BASE }, Fault::Stranded);
}

#[test]
fn proxies_that_do_not_look_stick() {
    needs(Rule::R9, TWO, Fault::Stuck);
}

#[test]
fn a_proxy_that_starts_and_serves_before_it_has_looked_serves_the_loser() {
    needs(Rule::R9Start, TWO, Fault::LoserServed);
}

/// Found by the model: where it was led to may have lost the database already, or a newer epoch may be open.
#[test]
fn a_proxy_that_ends_its_hold_without_another_look_serves_the_loser() {
    needs(Rule::R9Again, TWO, Fault::LoserServed);
}

#[test]
fn a_member_that_comes_back_from_a_broken_network_without_a_look_serves_the_loser() {
    needs(Rule::R9Connect, Shape { members: 1, network: Network::Cuts, ..BASE }, Fault::LoserServed);
}

/// Found by the model: it starts at the old server, which is gone, and never asks the one that has the database.
#[test]
fn a_proxy_that_only_looks_at_a_silent_backend_is_stranded() {
    needs(Rule::R9Evidence, ONE_CUT, Fault::Stranded);
}

#[test]
fn a_member_that_nobody_waited_for_serves_the_loser() {
    needs(Rule::R9Members, Shape { members: 1, ..BASE }, Fault::LoserServed);
}

#[test]
fn a_target_that_opens_before_the_evidence_makes_two_sides() {
    needs(Rule::R10, TWO, Fault::TwoSides);
}

#[test]
fn a_switch_without_evidence_sticks_on_the_way_back() {
    needs(Rule::R10Witness, TWO, Fault::Stuck);
}

#[test]
fn a_fence_that_shuts_out_the_proxies_sticks() {
    needs(Rule::R12, TWO, Fault::Stuck);
}

#[test]
fn a_decision_before_the_catch_up_loses_writes() {
    needs(Rule::S4, Shape { listed: 1, data: true, ..BASE }, Fault::Lost);
}

#[test]
fn a_way_back_that_is_kept_only_after_the_switch_loses_writes() {
    needs(Rule::S6, Shape { listed: 1, data: true, ..BASE }, Fault::Lost);
}

#[test]
fn a_way_back_attached_beside_the_way_forward_goes_in_a_circle() {
    needs(Rule::S10, Shape { listed: 1, data: true, ..BASE }, Fault::Echo);
}

/// What the product does not do yet costs stale reads; it never costs a write, or service for good.
#[test]
fn the_product_as_it_is_keeps_one_side_loses_nothing_and_never_sticks() {
    for shape in [TWO, ONE_CUT, Shape { members: 1, data: true, network: Network::Cuts, ..BASE }] {
        let found = search(shape, &Rule::AHEAD, None);
        assert!(found.complete);
        let worst = found.faults.iter().map(|(fault, _)| *fault);
        let worst: Vec<_> = worst.filter(|fault| !matches!(fault, Fault::LoserServed)).collect();
        assert!(worst.is_empty(), "{worst:?}");
    }
}

/// R2 and the refusal of stale PAUSEs are each dispensable here.
#[test]
fn aborts_that_are_no_decision_are_caught_by_the_other_rules() {
    let found = search(TWO, &[Rule::R2], None);
    assert!(found.complete && found.faults.is_empty());
    let found = search(TWO, &[Rule::R7Pause], None);
    assert!(found.complete && found.faults.is_empty());
}

/// Which of the proxies is which makes no difference: kept apart or not, the same is found.
#[test]
fn states_that_differ_in_the_order_of_the_proxies_are_one() {
    let mut state = Machine { shape: TWO, rules: Rules::all() }.first();
    state.proxies[0].phase = Phase::Down;
    let mut other = state;
    other.proxies.swap(0, 1);
    assert_ne!(state, other);
    assert_eq!(state.sorted(TWO), other.sorted(TWO));
    let listed_and_member = Shape { listed: 1, members: 1, ..BASE };
    assert_ne!(state.sorted(listed_and_member), other.sorted(listed_and_member));
    state.cut = Some(Cut { proxy: 0, side: Side::Blue });
    other.cut = Some(Cut { proxy: 1, side: Side::Blue });
    assert_eq!(state.sorted(TWO), other.sorted(TWO));
    other.cut = state.cut;
    assert_ne!(state.sorted(TWO), other.sorted(TWO));
}

/// A model whose transitions can not fire proves nothing.
#[test]
fn every_verb_is_taken_and_a_rollback_comes_back_into_service() {
    let shape = Shape { listed: 1, crashes: 1, network: Network::Cuts, data: true, ..BASE };
    let machine = Machine { shape, rules: Rules::all() };
    let (mut verbs, mut back) = (HashSet::new(), false);
    let mut seen = HashSet::from([machine.first().pack()]);
    let mut todo = vec![machine.first()];
    let mut next = Vec::new();
    while let Some(state) = todo.pop() {
        assert_eq!(State::unpack(state.pack()), state);
        let commits = state.epochs.iter().filter(|epoch| epoch.evidence).count();
        back |= commits == 2 && machine.in_service(&state) && state.proxies[0].route_epoch == 2;
        machine.successors(&state, &mut next);
        for (step, after) in &next {
            let name = format!("{step:?}").replace(char::is_numeric, "_");
            verbs.insert(if let Step::Cut(_) = step { "Cut".to_owned() } else { name });
            if seen.insert(after.pack()) {
                todo.push(*after);
            }
        }
    }
    assert!(back, "no way there and back");
    // 9 of a proxy, 10 of the controller (Open on two sides, Closed only without R4), 8 arrivals, 5 of the writer, 2 of the
    // network.
    assert_eq!(verbs.len(), 34, "{verbs:#?}");
}
