//! Input that no client and no server should send: a clear answer where the protocol has one, a closed connection, a proxy
//! that lives, and nothing of it in anybody else's session.
//!
//! Invariant: after each piece of nonsense a client that was there before is served as if nothing had happened.

use bytes::{BufMut, BytesMut};
use e2e::client::Client;
use e2e::pair::{APP, DATABASE, SOURCE, password};
use e2e::proxy::{Proxy, ProxyOptions};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::house::{House, LIMIT, errors, first_cell, message, sqlstate, trusted};

/// A packet without a tag: a Startup with this version code.
fn startup(code: u32, parameters: &[(&str, &str)]) -> BytesMut {
    let mut body = BytesMut::new();
    body.put_u32(code);
    for (name, value) in parameters {
        for text in [name, value] {
            body.put_slice(text.as_bytes());
            body.put_u8(0);
        }
    }
    body.put_u8(0);
    packet(&body)
}

fn packet(body: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32(u32::try_from(body.len() + 4).unwrap());
    out.put_slice(body);
    out
}

/// What comes back up to the end of the connection; a connection that stays open fails the test.
async fn hear_all(port: u16, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    hear_rest(&mut stream, said).await
}

async fn hear_rest(stream: &mut TcpStream, said: &[u8]) -> Vec<u8> {
    // The proxy may close before it has read everything.
    let _ = stream.write_all(said).await;
    let _ = stream.shutdown().await;
    let mut heard = Vec::new();
    let reading = tokio::time::timeout(LIMIT, stream.read_to_end(&mut heard)).await.expect("the connection is closed");
    // A reset after the answer is an end, too: bytes that nobody read were under way.
    let _ = reading;
    heard
}

/// The SQLSTATE of the ErrorResponse in these bytes.
fn code_in(heard: &[u8]) -> Option<String> {
    let at = heard.windows(2).position(|pair| pair == b"\0C")?;
    Some(String::from_utf8_lossy(heard.get(at + 2..at + 7)?).into_owned())
}

#[tokio::test]
async fn strangers_and_wrong_passwords_get_postgresqls_own_answers() {
    let house = House::open(|_| ()).await;
    let mut words = Vec::new();
    for (user, secret) in [(APP, "guess"), ("stranger", "guess")] {
        let mut login = house.login(user);
        login.password(secret);
        let error = Client::connect(&login).await.unwrap_err();
        assert_eq!(sqlstate(&error), "28P01");
        words.push(error.as_db_error().unwrap().message().replace(user, "x"));
    }
    assert_eq!(words[0], words[1], "a stranger does not learn who exists");
    let mut login = house.login(APP);
    let error = Client::connect(login.dbname("nowhere")).await.unwrap_err();
    assert_eq!(sqlstate(&error), "3D000");
    // Only who has proved who it is learns which databases exist.
    let mut login = house.login(APP);
    let error = Client::connect(login.password("guess").dbname("nowhere")).await.unwrap_err();
    assert_eq!(sqlstate(&error), "28P01");
}

#[tokio::test]
async fn versions_are_negotiated_once_and_wrong_ones_refused() {
    let house = House::open(|options| {
        options.setting("auth_type", "trust");
        options.users.retain(|line| !line.starts_with("\"app\""));
        options.users.push(format!("\"app\" \"{}\"", password(APP)));
    })
    .await;
    let port = house.proxy.port();
    let who = [("user", APP), ("database", DATABASE)];
    for code in [2 << 16, 4 << 16, 0, 1, u32::MAX] {
        let heard = hear_all(port, &startup(code, &who)).await;
        assert_eq!(code_in(&heard).as_deref(), Some("0A000"), "{code:#x}: {heard:?}");
    }
    for (code, options, newest, unknown) in [
        (3 << 16, &[][..], None, 0),
        ((3 << 16) | 2, &[], None, 0),
        ((3 << 16) | 9999, &[("_pq_.test_protocol_negotiation", "x")], Some(2), 1),
        (3 << 16, &[("_pq_.a", "1"), ("_pq_.b", "2")], Some(0), 2),
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(&startup(code, &[&who[..], options].concat())).await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b"Z\0\0\0\x05I") {
            assert!(stream.read_buf(&mut heard).await.unwrap() > 0, "{code:#x}: {}", String::from_utf8_lossy(&heard));
        }
        let mut negotiations = Vec::new();
        let mut rest = &heard[..];
        while !rest.is_empty() {
            let length = usize::try_from(u32::from_be_bytes(rest[1..5].try_into().unwrap())).unwrap();
            if rest[0] == b'v' {
                let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
                negotiations.push((number(5) & 0xffff, number(9)));
            }
            rest = &rest[length + 1..];
        }
        assert_eq!(negotiations, newest.map(|minor| (minor, unknown)).into_iter().collect::<Vec<_>>(), "{code:#x}");
    }
}

#[tokio::test]
async fn nonsense_before_a_login_is_answered_and_closed() {
    let house = House::open(|_| ()).await;
    let bystander = house.connect(APP).await;
    let huge = [0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0];
    let half = &startup(3 << 16, &[("user", APP)])[..9];
    let no_end = packet(&[0, 3, 0, 0, b'u', b's', b'e', b'r']);
    let no_user = startup(3 << 16, &[("database", DATABASE)]);
    let tls_and_more = [&[0, 0, 0, 8, 4, 210, 22, 47][..], &startup(3 << 16, &[("user", APP)])].concat();
    let short_cancel = packet(&[4, 210, 22, 46, 0]);
    let many_options = startup(3 << 16, &vec![("user", APP); 1000]);
    for (said, code) in [
        (&huge[..], Some("08P01")),
        (&[0, 0, 0, 0], Some("08P01")),
        (&[0, 0, 0, 7, 0, 3, 0], Some("08P01")),
        (half, None),
        (&no_end, Some("08P01")),
        (&no_user, Some("28000")),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Some("08P01")),
        (&[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0], None),
        (&tls_and_more, None),
        (&short_cancel, Some("08P01")),
        (&many_options, None),
    ] {
        let heard = hear_all(house.proxy.port(), said).await;
        if code.is_some() {
            assert_eq!(code_in(&heard).as_deref(), code, "{said:?}: {:?}", String::from_utf8_lossy(&heard));
        }
        assert_eq!(bystander.number("SELECT 1").await.unwrap(), 1);
    }
    // At the password.
    for (tag, body) in
        [(b'p', &b""[..]), (b'p', b"SCRAM-SHA-256\0"), (b'p', b"NONE\0\0\0\0\0"), (b'Q', b"SELECT 1\0"), (b'X', b"")]
    {
        let mut stream = TcpStream::connect(("127.0.0.1", house.proxy.port())).await.unwrap();
        stream.write_all(&startup(3 << 16, &[("user", APP), ("database", DATABASE)])).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'R');
        let heard = hear_rest(&mut stream, &message(tag, body)).await;
        assert!(!heard.windows(6).any(|bytes| bytes == b"Z\0\0\0\x05I"), "{tag}: nobody gets in this way");
    }
    let mut stream = TcpStream::connect(("127.0.0.1", house.proxy.port())).await.unwrap();
    stream.write_all(&startup(3 << 16, &[("user", APP), ("database", DATABASE)])).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'R');
    let heard = hear_rest(&mut stream, &[b'p', 0x7f, 0xff, 0xff, 0xff]).await;
    assert_eq!(code_in(&heard).as_deref(), Some("08P01"));
    assert_eq!(bystander.number("SELECT 1").await.unwrap(), 1);
}

#[tokio::test]
async fn nonsense_after_a_login_is_answered_and_leaves_nothing_behind() {
    let house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let bystander = house.connect(APP).await;
    for in_transaction in [false, true] {
        for (said, code) in [
            (&b"!\0\0\0\x04"[..], "08P01"),
            (b"Q\0\0\0\0", "08P01"),
            (b"Q\0\0\0\x03", "08P01"),
            (b"Q\xff\xff\xff\xff", "08P01"),
            (b"\0\0\0\0\0\0\0\0", "08P01"),
            (b"p\0\0\0\x08abcd", "08P01"),
        ] {
            let mut wire = house.wire().await;
            if in_transaction {
                assert_eq!(wire.query("BEGIN; UPDATE accounts SET abalance = 1").await.unwrap().1, b'T');
            }
            let heard = hear_rest(wire.stream(), said).await;
            assert_eq!(code_in(&heard).as_deref(), Some(code), "{said:?}: {:?}", String::from_utf8_lossy(&heard));
            assert_eq!(bystander.number("SELECT sum(abalance)::bigint FROM accounts").await.unwrap(), 0);
        }
    }
    // Bodies are the server's affair: it says what is wrong with them, and the session goes on.
    for said in [&b"B\0\0\0\x04"[..], b"B\0\0\0\x06\0\0", b"E\0\0\0\x05\0", b"P\0\0\0\x04", b"D\0\0\0\x06zx"] {
        let mut wire = house.wire().await;
        wire.send(&[said, b"S\0\0\0\x04"].concat()).await.unwrap();
        let (messages, status) = wire.until_ready().await.unwrap();
        let code = &*errors(&messages)[0].sqlstate;
        assert!(["08P01", "26000"].contains(&code) && status == b'I', "{said:?}: {code}");
        assert_eq!(bystander.number("SELECT 1").await.unwrap(), 1);
    }
    // Half a message and then the end.
    for part in [&b"Q"[..], b"Q\0\0\0\x20SELECT", b"P\0\0\0\x40\0INSERT", b"d\0\0\x10\0x"] {
        let mut wire = house.wire().await;
        assert!(hear_rest(wire.stream(), part).await.is_empty());
        assert_eq!(bystander.number("SELECT 1").await.unwrap(), 1);
    }
    // CopyData that nobody asked for is ignored, as a server does.
    let mut wire = house.wire().await;
    wire.send(&message(b'd', b"stray")).await.unwrap();
    wire.send(&message(b'c', b"")).await.unwrap();
    assert_eq!(first_cell(&wire.query("SELECT 5").await.unwrap().0).unwrap(), "5");
}

/// The same storm on every run: a generator of 64 bits (Vigna's splitmix64) with the storm's number as seed.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[tokio::test]
async fn two_hundred_storms_of_random_bytes_harm_nobody() {
    const TAGS: &[u8] = b"QPBDECSHFdcfXp";
    let house = House::open(|options| options.setting("default_pool_size", 2)).await;
    let bystander = house.connect(APP).await;
    bystander.run("SET application_name = 'bystander'").await.unwrap();
    for storm in 0..200_u64 {
        let mut seed = storm;
        let mut bytes = Vec::new();
        for _ in 0..1 + next_random(&mut seed) % 40 {
            let body: Vec<u8> =
                (0..next_random(&mut seed) % 60).map(|_| next_random(&mut seed).to_le_bytes()[0]).collect();
            // Half of them have the shape of messages, so that they get further than the first length.
            match next_random(&mut seed) % 2 {
                0 => bytes.extend_from_slice(&body),
                _ => bytes
                    .extend_from_slice(&message(TAGS[usize::try_from(next_random(&mut seed) % 14).unwrap()], &body)),
            }
        }
        if storm % 2 == 0 {
            hear_all(house.proxy.port(), &bytes).await;
        } else {
            let mut wire = house.wire().await;
            hear_rest(wire.stream(), &bytes).await;
        }
        if storm % 10 == 0 {
            assert_eq!(bystander.text("SHOW application_name").await.unwrap().as_deref(), Some("bystander"), "{storm}");
        }
    }
    assert_eq!(bystander.number("SELECT count(*) FROM accounts").await.unwrap(), 1000);
}

/// When a pretended server begins to speak nonsense.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Greeting,
    Welcome,
    AnswerToQuery,
}

/// Answers a login without asking for a password, until its phase comes; then it says its nonsense and waits.
async fn pretend(listener: TcpListener, phase: Phase, nonsense: Vec<u8>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let nonsense = nonsense.clone();
        tokio::spawn(async move { pretend_one(&mut stream, phase, &nonsense).await });
    }
}

async fn pretend_one(stream: &mut TcpStream, phase: Phase, nonsense: &[u8]) -> std::io::Result<()> {
    let length = stream.read_u32().await?;
    let mut startup = vec![0; usize::try_from(length).unwrap_or(8).clamp(8, 4096) - 4];
    stream.read_exact(&mut startup).await?;
    if phase == Phase::Greeting {
        stream.write_all(nonsense).await?;
    } else {
        let mut welcome = message(b'R', &[0, 0, 0, 0]);
        for (name, value) in [("server_version", "17.0"), ("client_encoding", "UTF8"), ("is_superuser", "off")] {
            welcome.extend_from_slice(&message(b'S', format!("{name}\0{value}\0").as_bytes()));
        }
        welcome.extend_from_slice(&message(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]));
        if phase == Phase::Welcome {
            welcome.extend_from_slice(nonsense);
        }
        welcome.extend_from_slice(&message(b'Z', b"I"));
        stream.write_all(&welcome).await?;
    }
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).await? > 0 {
        if phase == Phase::AnswerToQuery {
            stream.write_all(nonsense).await?;
        }
    }
    Ok(())
}

async fn before_pretended(phase: Phase, nonsense: &[u8]) -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(pretend(listener, phase, nonsense.to_vec()));
    let mut options = ProxyOptions::for_backends(&[(SOURCE, port)], 1).unwrap();
    options.setting("auth_type", "trust");
    options.setting("server_connect_timeout", "700ms");
    options.setting("query_wait_timeout", 3);
    options.users.push(format!("\"app\" \"{}\"", password(APP)));
    options.database(DATABASE).remove("control_user");
    options.database(DATABASE).remove("control_password");
    Proxy::start(options).await.unwrap()
}

#[tokio::test]
async fn a_server_that_talks_nonsense_costs_its_client_an_error_and_nobody_else_anything() {
    let long_name = message(b'S', &[b'x'; 2_000_000]);
    for (phase, nonsense) in [
        (Phase::Greeting, &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..]),
        (Phase::Greeting, b"R\0\0\0\x04"),
        (Phase::Greeting, b"R\0\0\0\x08\0\0\0\x63"),
        (Phase::Greeting, b"R\x7f\xff\xff\xff\0\0\0\0"),
        (Phase::Greeting, b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0"),
        (Phase::Greeting, b"E\0\0\0\x05\0"),
        (Phase::Greeting, b"Z\0\0\0\x05I"),
        (Phase::Greeting, b""),
        (Phase::Welcome, b"Z\0\0\0\x06II"),
        (Phase::Welcome, b"S\0\0\0\x08abcd"),
        (Phase::Welcome, b"\0\0\0\0\0\0\0"),
        (Phase::Welcome, &long_name),
        (Phase::AnswerToQuery, b"Z\0\0\0\x06II"),
        (Phase::AnswerToQuery, b"Z\0\0\0\x04"),
        (Phase::AnswerToQuery, b"C\0\0\0\0"),
        (Phase::AnswerToQuery, b"T\xff\xff\xff\xff\0\0"),
        (Phase::AnswerToQuery, b"S\0\0\0\x08abcd"),
        (Phase::AnswerToQuery, &long_name),
    ] {
        let mut proxy = before_pretended(phase, nonsense).await;
        let context = format!("{phase:?} {:?}", &nonsense[..nonsense.len().min(12)]);
        let entered =
            tokio::time::timeout(LIMIT, trusted(proxy.port(), &[("user", APP), ("database", DATABASE)])).await;
        match (phase, entered.expect("an answer")) {
            (Phase::Greeting | Phase::Welcome, Err(report)) => {
                assert!(["57P03", "08P01", "28000"].contains(&&*report.sqlstate), "{context}: {report}");
            }
            (_, Ok((mut wire, _))) => {
                let mut output = BytesMut::new();
                frontend::query("SELECT 1", &mut output).unwrap();
                wire.send(&output).await.unwrap();
                let error = loop {
                    match wire.message().await {
                        Ok(Message::ErrorResponse(body)) => break Some(e2e::wire::Report::of(&body)),
                        Ok(_) => {}
                        Err(_) => break None,
                    }
                };
                assert!(error.is_some(), "{context}: closed without a word");
            }
            (Phase::AnswerToQuery, Err(report)) => panic!("{context}: {report}"),
        }
        assert_eq!(proxy.ask("SHOW VERSION").await.unwrap().len(), 1, "{context}");
        assert!(proxy.runs());
        proxy.kill9();
    }
}

/// An answer that nobody asked for must not reach the next client of the connection.
#[tokio::test]
async fn what_a_server_says_unasked_at_rest_is_told_to_nobody() {
    let mut answer = Vec::new();
    answer.extend_from_slice(&message(b'C', b"SELECT 0\0"));
    answer.extend_from_slice(&message(b'Z', b"I"));
    let stray = message(b'D', b"\0\x01\0\0\0\x06secret");
    let proxy = before_pretended(Phase::AnswerToQuery, &[&answer[..], &stray].concat()).await;
    let who = [("user", APP), ("database", DATABASE)];
    let (mut one, _) = trusted(proxy.port(), &who).await.unwrap();
    let (mut two, _) = trusted(proxy.port(), &who).await.unwrap();
    for _ in 0..5 {
        for wire in [&mut one, &mut two] {
            let (messages, status) = wire.query("SELECT 1").await.unwrap();
            assert!(errors(&messages).is_empty() && status == b'I');
            assert_eq!(first_cell(&messages), None, "a row that was not asked for");
        }
    }
}
