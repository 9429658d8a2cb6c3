//! Every reader against bytes of every kind; every writer against its reader.

use bytes::BytesMut;

use super::*;
use crate::frame;
use proptest::prelude::*;

fn body_of(write: impl FnOnce(&mut BytesMut)) -> (u8, Vec<u8>) {
    let mut out = BytesMut::new();
    write(&mut out);
    let frame = frame::next(&out, 1 << 20).unwrap().unwrap();
    assert_eq!(frame.len_bytes(), out.len());
    (frame.tag, frame.body.to_vec())
}

/// Every reader, so that a new one is not forgotten.
fn read_with_all(bytes: &[u8]) {
    let _ = first_packet(bytes);
    let _ = startup_pairs(bytes);
    let _ = options(bytes);
    let _ = sasl_initial_response(bytes);
    let _ = password(bytes);
    let _ = authentication(bytes);
    let _ = notice(bytes);
    let _ = parameter_status(bytes);
    let _ = backend_key_data(bytes);
    let _ = ready_for_query(bytes);
    let _ = negotiate_protocol_version(bytes);
    let _ = row_description(bytes);
    let _ = data_row(bytes);
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        read_with_all(&bytes);
    }

    #[test]
    fn small_numbers_in_front_do_not_either(front in proptest::collection::vec(0u8..4, 0..12), rest in proptest::collection::vec(any::<u8>(), 0..40)) {
        read_with_all(&[front, rest].concat());
    }

    #[test]
    fn a_cut_message_is_malformed_and_not_misread(cut in 0usize..100) {
        let mut out = BytesMut::new();
        put_startup(&mut out, Protocol::V3_0, &[(b"user", b"alice"), (b"database", b"app"), (b"application_name", b"x y")]);
        let body = frame::startup(&out).unwrap().unwrap();
        let FirstPacket::Startup { parameters, .. } = first_packet(body).unwrap() else { panic!("not a startup") };
        let cut = cut % parameters.len();
        prop_assert!(startup_pairs(&parameters[..cut]).is_err());
    }

    #[test]
    fn sasl_messages_are_read_as_written(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (tag, body) = body_of(|out| put_sasl_initial_response(out, b"SCRAM-SHA-256", &data));
        prop_assert_eq!(tag, b'p');
        prop_assert_eq!(sasl_initial_response(&body).unwrap(), (&b"SCRAM-SHA-256"[..], Some(&data[..])));
    }
}

#[test]
fn first_packets_are_told_apart() {
    assert_eq!(first_packet(&SSL_REQUEST_CODE.to_be_bytes()), Ok(FirstPacket::SslRequest));
    assert_eq!(first_packet(&GSSENC_REQUEST_CODE.to_be_bytes()), Ok(FirstPacket::GssEncRequest));
    assert!(first_packet(&[&SSL_REQUEST_CODE.to_be_bytes()[..], b"x"].concat()).is_err());
    assert!(first_packet(b"\0\x03").is_err());
    let packet = first_packet(b"\0\x03\x27\x0fuser\0").unwrap();
    assert_eq!(packet, FirstPacket::Startup { major: 3, minor: 9999, parameters: b"user\0" });
}

#[test]
fn cancel_secrets_have_4_to_256_bytes() {
    for (len, good) in [(0, false), (3, false), (4, true), (32, true), (256, true), (257, false)] {
        let key = CancelKey { pid: -7, secret: vec![9; len].into() };
        let mut out = BytesMut::new();
        put_cancel_request(&mut out, &key);
        let read = first_packet(frame::startup(&out).unwrap().unwrap());
        assert_eq!(read == Ok(FirstPacket::Cancel(key.clone())), good, "{len}");
        assert_eq!(backend_key_data(&body_of(|out| put_backend_key_data(out, &key)).1).is_ok(), good, "{len}");
    }
}

#[test]
fn a_startup_message_ends_with_its_terminator() {
    assert_eq!(startup_pairs(b"user\0a\0\0").unwrap(), vec![(&b"user"[..], &b"a"[..])]);
    assert_eq!(startup_pairs(b"user\0\xff\xfe\0\0").unwrap(), vec![(&b"user"[..], &b"\xff\xfe"[..])]);
    assert_eq!(startup_pairs(b"user\0\0\0").unwrap(), vec![(&b"user"[..], &b""[..])]);
    assert!(startup_pairs(b"user\0a\0").is_err());
    assert!(startup_pairs(b"user\0a\0\0x").is_err());
    assert!(startup_pairs(b"").is_err());
}

#[test]
fn options_are_split_as_postgresql_splits_them() {
    let read = |text: &[u8]| {
        options(text).map(|pairs| {
            pairs
                .into_iter()
                .map(|(n, v)| format!("{}={}", String::from_utf8_lossy(&n), String::from_utf8_lossy(&v)))
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(read(b"").unwrap(), Vec::<String>::new());
    assert_eq!(read(b"-c a=1 -cb=2\t--work-mem=64MB").unwrap(), ["a=1", "b=2", "work_mem=64MB"]);
    assert_eq!(read(br"  -c search_path=a,\ b\\c ").unwrap(), [r"search_path=a, b\c"]);
    assert_eq!(read(b"-c a=b=c --e=").unwrap(), ["a=b=c", "e="]);
    for wrong in [&b"-c"[..], b"-c a", b"--", b"-B 5", b"word", b"-c =1"] {
        assert!(read(wrong).is_err(), "{}", String::from_utf8_lossy(wrong));
    }
}

#[test]
fn authentication_requests_are_read_as_written() {
    for request in [
        Authentication::Ok,
        Authentication::Cleartext,
        Authentication::Md5([1, 2, 3, 4]),
        Authentication::Sasl(vec![b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"]),
        Authentication::SaslContinue(b"r=x"),
        Authentication::SaslFinal(b"v=y"),
        Authentication::Other(7),
    ] {
        let (tag, body) = body_of(|out| put_authentication(out, &request));
        assert_eq!((tag, authentication(&body).unwrap()), (b'R', request));
    }
}

#[test]
fn a_broken_error_is_still_an_error() {
    let full = notice(b"SERREUR\0VERROR\0C28P01\0Mno\0Ddetail\0Hhint\0Ffile\0\0");
    assert_eq!((full.severity, full.sqlstate, full.message), (&b"ERROR"[..], &b"28P01"[..], &b"no"[..]));
    assert_eq!((full.detail, full.hint), (&b"detail"[..], &b"hint"[..]));
    assert_eq!(notice(b"").sqlstate, b"");
    assert_eq!(notice(b"Mcut o").message, b"");
    assert_eq!(notice(b"SFATAL\0C").severity, b"FATAL");
}

#[test]
fn rows_are_bounded_by_their_body() {
    assert_eq!(data_row(b"\0\x02\0\0\0\x01a\xff\xff\xff\xff").unwrap(), vec![Some(&b"a"[..]), None]);
    for wrong in [&b"\x7f\xff"[..], b"\0\x01\0\0\0\x05a", b"\0\x01\xff\xff\xff\xfe", b"\0\0x", b"\xff\xff"] {
        assert!(data_row(wrong).is_err(), "{wrong:?}");
    }
    assert_eq!(row_description(&[b"\0\x01name\0", &[0; 18][..]].concat()).unwrap(), vec![b"name"]);
    assert!(row_description(b"\0\x01name\0").is_err());
}

#[test]
fn unknown_options_are_echoed_as_they_came() {
    let unknown: [&[u8]; 2] = [b"_pq_.a", b"_pq_.\xff"];
    let (tag, body) = body_of(|out| put_negotiate_protocol_version(out, Protocol::V3_2, &unknown));
    assert_eq!(tag, b'v');
    assert_eq!(negotiate_protocol_version(&body).unwrap(), (0x3_0002, unknown.to_vec()));
    assert!(negotiate_protocol_version(b"\0\x03\0\0\x7f\xff\xff\xff").is_err());
}
