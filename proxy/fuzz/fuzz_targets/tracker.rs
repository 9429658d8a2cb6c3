//! Feeds the tracker messages that no sane client or server sends; each takes two bytes of the input: its type, and the
//! status of a ReadyForQuery or whether the gate is shut.
//!
//! Invariant: no panic; a session at rest owes and awaits nothing; a message that is not forwarded changes nothing, except
//! that the end of copy data may be noted.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pgcutover::tracker::Front;
use pgcutover::tracker::Shut;
use pgcutover::tracker::Status;
use pgcutover::tracker::Tracker;

fuzz_target!(|input: &[u8]| {
    let mut tracker = Tracker::default();
    let (mut forwarded, mut answered) = (0_u32, 0_u32);
    for message in input.chunks_exact(2) {
        let [kind, detail] = [message[0], message[1]];
        if kind & 0x80 == 0 {
            forwarded += front(&mut tracker, kind, if detail & 1 == 0 { Shut::No } else { Shut::Yes });
        } else {
            tracker.backend(kind & 0x7f, detail);
            answered += u32::from(kind & 0x7f == b'Z');
        }
        if tracker.at_rest() {
            assert!(!tracker.is_busy());
            assert_eq!(tracker.status(), Status::Idle);
        }
        // A server that never answered has finished nothing.
        assert!(answered > 0 || forwarded == 0 || tracker.is_busy(), "{input:02x?}");
    }
});

/// Whether a message that asks for an answer was sent on.
fn front(tracker: &mut Tracker, tag: u8, shut: Shut) -> u32 {
    let (rested, busy) = (tracker.at_rest(), tracker.is_busy());
    let verdict = tracker.frontend(tag, shut);
    match verdict {
        Front::Forward => {}
        Front::Hold => assert!(busy && !tracker.at_rest(), "held, and nothing outstanding will ever let it go"),
        Front::Drop | Front::Terminate | Front::Illegal => assert_eq!(tracker.at_rest(), rested),
    }
    u32::from(verdict == Front::Forward && matches!(tag, b'Q' | b'F' | b'S'))
}
