//! /metrics, /livez and /readyz, on a listener of their own.
//!
//! Invariant: nothing that a request says changes anything; a request is bounded in bytes and time, and so is their number.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Bytes of a request's line and headers; hyper's smallest buffer. What scrapers send has a few hundred.
const REQUEST_BYTES_MAX: usize = 8192;
/// From accepting a connection to having answered it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at a time: a few scrapers and probes. Further ones wait in the listen queue.
const CONNECTIONS_MAX: usize = 32;
/// Before accepting again after accept failed, which it does while file descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the pages say.
pub trait Pages: Send + Sync + 'static {
    /// The page /metrics, made for this request.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// Whether new clients should be sent here.
    fn readiness(&self) -> Readiness;
}

/// Whether new clients should be sent here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet: listeners or routes are not up.
    Starting,
    /// Yes. A paused proxy is ready too: it answers logins and holds what they send.
    Ready,
    /// No longer: it is shutting down.
    Draining,
}

impl Readiness {
    fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting\n",
            Self::Ready => "ready\n",
            Self::Draining => "draining\n",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::Ready => StatusCode::OK,
            Self::Starting | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Answers requests until `closing`; connections that are open then are dropped.
pub async fn serve<P: Pages>(listener: TcpListener, pages: Arc<P>, closing: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropping the set ends its tasks: none outlives this function.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (stream, place) = admitted(&listener, &places) => {
                let pages = Arc::clone(&pages);
                connections.spawn(async move {
                    connection(stream, pages).await;
                    drop(place);
                });
            }
        }
    }
}

/// The next connection and its place. Cancel safe: a connection is accepted last.
async fn admitted(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<tokio::sync::OwnedSemaphorePermit>) {
    // An error would mean a closed semaphore, and this one is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One request and its answer.
async fn connection<P: Pages>(stream: TcpStream, pages: Arc<P>) {
    let service = service_fn(move |request| {
        let pages = Arc::clone(&pages);
        async move { Ok::<_, Infallible>(answer(&request, &*pages).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(REQUEST_BYTES_MAX).timer(TokioTimer::new()).header_read_timeout(ANSWER_TIMEOUT);
    let served = tokio::time::timeout(ANSWER_TIMEOUT, http.serve_connection(TokioIo::new(stream), service)).await;
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an HTTP request failed"),
        Err(_) => tracing::debug!("an HTTP request took too long"),
    }
}

/// Only the method and the path count; a body is not read.
async fn answer<P: Pages>(request: &Request<Incoming>, pages: &P) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match request.uri().path() {
        "/metrics" => {
            let mut page = text(StatusCode::OK, pages.metrics().await);
            let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            page.headers_mut().insert(CONTENT_TYPE, format);
            page
        }
        "/livez" => text(StatusCode::OK, "alive\n"),
        "/readyz" => {
            let readiness = pages.readiness();
            text(readiness.status(), readiness.word())
        }
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /livez and /readyz\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    struct Pretended(Mutex<Readiness>);

    impl Pages for Pretended {
        async fn metrics(&self) -> String {
            "pgcutover_clients 1\n".to_owned()
        }

        fn readiness(&self) -> Readiness {
            *self.0.lock().unwrap()
        }
    }

    async fn served() -> (SocketAddr, Arc<Pretended>, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, closing) = (listener.local_addr().unwrap(), CancellationToken::new());
        let pages = Arc::new(Pretended(Mutex::new(Readiness::Starting)));
        tokio::spawn(serve(listener, Arc::clone(&pages), closing.clone()));
        (address, pages, closing)
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        tokio::time::timeout(DEADLINE, ask_for_as_long_as_it_takes(address, request)).await.unwrap()
    }

    async fn ask_for_as_long_as_it_takes(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // A refused request may be answered and closed before it is written whole.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    async fn status(address: SocketAddr, request: &str) -> String {
        ask(address, &format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n")).await.chars().skip(9).take(3).collect()
    }

    #[tokio::test]
    async fn only_a_ready_proxy_is_ready() {
        let (address, pages, _closing) = served().await;
        for (readiness, code) in [(Readiness::Starting, "503"), (Readiness::Ready, "200"), (Readiness::Draining, "503")]
        {
            *pages.0.lock().unwrap() = readiness;
            assert_eq!(status(address, "GET /readyz").await, code, "{readiness:?}");
            assert_eq!(status(address, "GET /livez").await, "200");
        }
    }

    #[tokio::test]
    async fn there_are_three_pages_to_read_and_none_to_write() {
        let (address, _, closing) = served().await;
        let page = ask(address, "GET /metrics HTTP/1.0\r\n\r\n").await;
        assert!(
            page.ends_with("\r\n\r\npgcutover_clients 1\n") && page.contains("text/plain; version=0.0.4"),
            "{page}"
        );
        for (request, code) in [
            ("GET /", "404"),
            ("GET /metrics/", "404"),
            ("POST /metrics", "405"),
            ("DELETE /livez", "405"),
            ("HEAD /livez", "200"),
        ] {
            assert_eq!(status(address, request).await, code, "{request}");
        }
        closing.cancel();
    }

    #[tokio::test]
    async fn a_request_is_bounded() {
        let (address, _, _closing) = served().await;
        let long = format!("GET /livez HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(REQUEST_BYTES_MAX));
        let answer = ask(address, &long).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        assert!(!ask(address, "nonsense\r\n\r\n").await.contains("200 OK"));
        assert_eq!(status(address, "GET /livez").await, "200", "others are served all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_dropped() {
        let (address, _, _closing) = served().await;
        // The only timers are the server's: the paused clock jumps to them.
        let answer = ask_for_as_long_as_it_takes(address, "GET /livez HTTP/1.1\r\n").await;
        assert!(!answer.contains("200 OK"), "{answer}");
    }
}
