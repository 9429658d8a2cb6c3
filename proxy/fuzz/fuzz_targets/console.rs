//! Gives the admin console's grammar anything that can be typed.
//!
//! Invariant: no panic; a command that was read prints in a form that is read as the same command.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pgcutover_api::command;

fuzz_target!(|text: &str| {
    match command::parse(text) {
        Ok(read) => {
            let printed = read.to_string();
            assert_eq!(command::parse(&printed).as_ref(), Ok(&read), "{text:?} printed as {printed:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
