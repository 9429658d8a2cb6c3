//! SCRAM-SHA-256 (RFC 5802, RFC 7677), both roles, as PostgreSQL speaks it.
//!
//! Invariant: pure: bytes in, bytes out; randomness and slow hashing come from the caller. Every message of a peer is
//! bounded and parsed without panic; secrets are compared in constant time.

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// The keys that let a proxy log in to a server as the client without knowing its password: tied to one verifier.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// HMAC(SaltedPassword, "Client Key"): proves who the client is.
    pub client_key: Digest,
    /// HMAC(SaltedPassword, "Server Key"): proves that the server knows the verifier.
    pub server_key: Digest,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// What a server stores of a password: `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    /// PBKDF2 rounds, at least 1.
    pub iterations: u32,
    /// Raw, not base64.
    pub salt: Box<[u8]>,
    /// SHA-256(ClientKey).
    pub stored_key: Digest,
    /// See [`Keys`].
    pub server_key: Digest,
}
