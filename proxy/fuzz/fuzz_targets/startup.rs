//! Reads the first packet of a connection as a stranger may send it.
//!
//! Invariant: no panic; what a StartupMessage says is found again in what we write from it.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use pgcutover::frame;
use pgcutover::message;
use pgcutover::message::FirstPacket;

fuzz_target!(|packet: &[u8]| {
    let Ok(Some(body)) = frame::startup(packet) else { return };
    match message::first_packet(body) {
        Ok(FirstPacket::Startup { parameters, .. }) => startup(parameters),
        Ok(FirstPacket::Cancel(key)) => {
            assert!(message::CANCEL_SECRET_BYTES.contains(&key.secret.len()));
            let mut out = BytesMut::new();
            message::put_cancel_request(&mut out, &key);
            let again = frame::startup(&out).unwrap().unwrap();
            assert_eq!(message::first_packet(again), Ok(FirstPacket::Cancel(key)));
        }
        Ok(FirstPacket::SslRequest | FirstPacket::GssEncRequest) => assert_eq!(body.len(), 4),
        Err(_) => {}
    }
});

fn startup(parameters: &[u8]) {
    let Ok(pairs) = message::startup_pairs(parameters) else { return };
    assert!(pairs.iter().all(|(name, _)| !name.is_empty()));
    for (_, value) in pairs.iter().filter(|(name, _)| *name == b"options") {
        if let Ok(settings) = message::options(value) {
            assert!(settings.iter().all(|(name, _)| !name.is_empty()));
        }
    }
    let mut out = BytesMut::new();
    message::put_startup(&mut out, message::Protocol::V3_0, &pairs);
    if let Ok(Some(body)) = frame::startup(&out) {
        let Ok(FirstPacket::Startup { parameters: again, .. }) = message::first_packet(body) else {
            panic!("our own StartupMessage is none");
        };
        assert_eq!(message::startup_pairs(again).unwrap(), pairs);
    }
}
