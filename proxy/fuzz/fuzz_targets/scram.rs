//! Plays SCRAM against a peer that lies: the first byte chooses the message that it sends.
//!
//! Invariant: no panic, and nobody is let in who was not told the keys.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pgcutover::scram::Binding;
use pgcutover::scram::ClientExchange;
use pgcutover::scram::Keys;
use pgcutover::scram::NONCE_RAW_BYTES;
use pgcutover::scram::ServerExchange;
use pgcutover::scram::Verifier;

/// Not derived from a password: that takes milliseconds.
const KEYS: Keys = Keys { client_key: [1; 32], server_key: [2; 32] };
const NONCE: [u8; NONCE_RAW_BYTES] = [3; NONCE_RAW_BYTES];
const CLIENT_FIRST: &[u8] = b"n,,n=,r=fyko+d2lbbFgONRv9qkxdawL";

fuzz_target!(|input: &[u8]| {
    let Some((choice, lie)) = input.split_first() else { return };
    let verifier = Verifier::of(&KEYS, b"0123456789abcdef", 4096);
    match choice % 5 {
        0 => {
            let _ = ServerExchange::start(lie, verifier, &NONCE, Binding::EndPoint(b"hash"));
        }
        1 => {
            let exchange = ServerExchange::start(CLIENT_FIRST, verifier, &NONCE, Binding::Declined).unwrap();
            assert!(exchange.finish(lie).is_err(), "a proof without the keys");
        }
        2 => challenged(lie),
        3 => {
            let (_, proven) = honest_challenge().prove(&KEYS);
            assert!(proven.verify(lie).is_err(), "a server that knows no verifier");
        }
        _ => {
            if let Some(read) = Verifier::parse(lie) {
                assert!(read.iterations >= 1 && !read.salt.is_empty());
            }
        }
    }
});

/// A challenge may be anything within bounds; answering it must not let the liar learn that we believed it.
fn challenged(lie: &[u8]) {
    let Ok(challenge) = ClientExchange::start(&NONCE).challenged(lie) else { return };
    assert!((1..=1_000_000).contains(&challenge.iterations) && !challenge.salt.is_empty());
    let (client_final, proven) = challenge.prove(&KEYS);
    assert!(client_final.starts_with(b"c=biws,r="));
    assert!(proven.verify(b"v=AAAA").is_err());
}

fn honest_challenge() -> pgcutover::scram::Challenge {
    let client = ClientExchange::start(&NONCE);
    let verifier = Verifier::of(&KEYS, b"0123456789abcdef", 4096);
    let server =
        ServerExchange::start(client.client_first(), verifier, &[4; NONCE_RAW_BYTES], Binding::Impossible).unwrap();
    client.challenged(server.server_first()).unwrap()
}
