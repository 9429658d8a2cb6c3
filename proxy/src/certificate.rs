//! What a login reads from an X.509 certificate: whom it names, and the hash that binds a login to it.
//!
//! Pure. Invariant: no bytes make it panic or read beyond them; whatever is not plainly one name or one known hash is
//! none. Signatures and validity are checked by the TLS handshake, not here.

use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// `[0]`, the version; certificates of version 1 have none.
const VERSION: u8 = 0xa0;
/// UTF8String, PrintableString, TeletexString, IA5String: the kinds of text whose bytes are the name.
const TEXTS: [u8; 4] = [0x0c, 0x13, 0x14, 0x16];

/// id-at-commonName, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// pkcs-1, 1.2.840.113549.1.1: the last number is the algorithm.
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
/// ansi-X9-62 signatures, 1.2.840.10045.4.
const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];

/// The subject's common name, as bytes. `None` where there is no name, more than one, or one that could be read in two
/// ways (a NUL in it, or an encoding of several bytes a character): PostgreSQL takes the first of several.
#[must_use]
pub fn common_name(certificate: &[u8]) -> Option<&[u8]> {
    let mut names = common_names(certificate)?;
    match (names.pop(), names.pop()) {
        (Some((tag, name)), None) if TEXTS.contains(&tag) && !name.is_empty() && !name.contains(&0) => Some(name),
        (Some(_) | None, _) => None,
    }
}

/// The data of `tls-server-end-point` (RFC 5929 §4.1): the certificate hashed with its signature's hash, or SHA-256 in
/// place of MD5 and SHA-1. `None` where the signature has no hash of its own to name (Ed25519) or names it in its
/// parameters (RSA-PSS: libpq before 16 can't follow), so that the binding isn't defined for both ends.
#[must_use]
pub fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Der(Der(certificate).expect(SEQUENCE)?);
    whole.expect(SEQUENCE)?;
    let algorithm = Der(whole.expect(SEQUENCE)?).expect(OBJECT_IDENTIFIER)?;
    let hash = match (algorithm.strip_prefix(RSA), algorithm.strip_prefix(ECDSA)) {
        (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => Sha256::digest(certificate).to_vec(),
        (Some([12]), _) | (_, Some([3, 3])) => Sha384::digest(certificate).to_vec(),
        (Some([13]), _) | (_, Some([3, 4])) => Sha512::digest(certificate).to_vec(),
        (Some([14]), _) | (_, Some([3, 1])) => Sha224::digest(certificate).to_vec(),
        (_, _) => return None,
    };
    Some(hash)
}

/// Every common name of the subject with its text's tag.
fn common_names(certificate: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut whole = Der(Der(certificate).expect(SEQUENCE)?);
    let mut signed = Der(whole.expect(SEQUENCE)?);
    // Version, serial number, then signature, issuer, validity.
    if signed.element()?.0 == VERSION {
        signed.element()?;
    }
    for _ in 0..3 {
        signed.expect(SEQUENCE)?;
    }
    let mut subject = Der(signed.expect(SEQUENCE)?);
    let mut names = Vec::new();
    while !subject.0.is_empty() {
        let mut attributes = Der(subject.expect(SET)?);
        while !attributes.0.is_empty() {
            let mut attribute = Der(attributes.expect(SEQUENCE)?);
            if attribute.expect(OBJECT_IDENTIFIER)? == COMMON_NAME {
                names.push(attribute.element()?);
            }
        }
    }
    Some(names)
}

/// Elements of DER, one after the other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// Tag and contents of the next element.
    fn element(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, short], mut rest) = self.0.split_first_chunk()?;
        let mut length = usize::from(short);
        if short > 0x7f {
            // Four bytes of length are more than a handshake carries.
            let count = usize::from(short & 0x7f);
            let (digits, after) = rest.split_at_checked(count).filter(|_| (1..=4).contains(&count))?;
            length = digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit));
            rest = after;
        }
        let (contents, after) = rest.split_at_checked(length)?;
        self.0 = after;
        Some((tag, contents))
    }

    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.element().filter(|(found, _)| *found == tag).map(|(_, contents)| contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair, SignatureAlgorithm};

    fn certificate(names: &[DnValue], algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "alice");
        for name in names {
            params.distinguished_name.push(DnType::CommonName, name.clone());
        }
        let key = KeyPair::generate_for(algorithm).unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn named(name: &str) -> Vec<u8> {
        certificate(&[DnValue::Utf8String(name.to_owned())], &rcgen::PKCS_ECDSA_P256_SHA256)
    }

    #[test]
    fn the_subjects_common_name_is_read_byte_for_byte() {
        assert_eq!(common_name(&named("alice")), Some(&b"alice"[..]));
        assert_eq!(common_name(&named("Ärger \"x\"")), Some("Ärger \"x\"".as_bytes()));
        let printable = DnValue::PrintableString("bob".try_into().unwrap());
        assert_eq!(common_name(&certificate(&[printable], &rcgen::PKCS_ED25519)), Some(&b"bob"[..]));
    }

    #[test]
    fn a_name_that_could_mean_two_users_names_nobody() {
        assert_eq!(common_name(&certificate(&[], &rcgen::PKCS_ECDSA_P256_SHA256)), None, "the organization is no name");
        assert_eq!(common_name(&named("alice\0.example")), None);
        assert_eq!(common_name(&named("")), None);
        let wide = DnValue::BmpString("alice".try_into().unwrap());
        assert_eq!(common_name(&certificate(&[wide], &rcgen::PKCS_ECDSA_P256_SHA256)), None);
        let two = with_two_names(b"alice", b"root");
        assert_eq!(common_names(&two).unwrap().len(), 2);
        assert_eq!(common_name(&two), None);
    }

    fn wrapped(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let contents = parts.concat();
        [&[tag, u8::try_from(contents.len()).unwrap()], &contents[..]].concat()
    }

    /// The least that has a subject: rcgen makes one name at most.
    fn with_two_names(first: &[u8], second: &[u8]) -> Vec<u8> {
        let name = |text: &[u8]| {
            let oid = wrapped(OBJECT_IDENTIFIER, &[COMMON_NAME]);
            wrapped(SET, &[&wrapped(SEQUENCE, &[&oid, &wrapped(0x0c, &[text])])])
        };
        let (empty, serial) = (wrapped(SEQUENCE, &[]), wrapped(0x02, &[b"\x01"]));
        let subject = wrapped(SEQUENCE, &[&name(first), &name(second)]);
        wrapped(SEQUENCE, &[&wrapped(SEQUENCE, &[&serial, &empty, &empty, &empty, &subject])])
    }

    #[test]
    fn the_end_point_is_hashed_as_its_signature_is() {
        for (algorithm, bytes) in [(&rcgen::PKCS_ECDSA_P256_SHA256, 32), (&rcgen::PKCS_ECDSA_P384_SHA384, 48)] {
            let certificate = certificate(&[], algorithm);
            let end_point = end_point(&certificate).unwrap();
            assert_eq!(end_point.len(), bytes);
            let wanted =
                if bytes == 32 { Sha256::digest(&certificate).to_vec() } else { Sha384::digest(&certificate).to_vec() };
            assert_eq!(end_point, wanted);
        }
        assert_eq!(end_point(&certificate(&[], &rcgen::PKCS_ED25519)), None, "RFC 5929 does not define it");
    }

    #[test]
    fn every_named_hash_is_known_and_weak_ones_become_sha_256() {
        for (oid, bytes) in [
            ([RSA, &[4]].concat(), Some(32)),
            ([RSA, &[5]].concat(), Some(32)),
            ([RSA, &[11]].concat(), Some(32)),
            ([RSA, &[12]].concat(), Some(48)),
            ([RSA, &[13]].concat(), Some(64)),
            ([RSA, &[14]].concat(), Some(28)),
            ([RSA, &[10]].concat(), None),
            ([ECDSA, &[1]].concat(), Some(32)),
            ([ECDSA, &[3, 1]].concat(), Some(28)),
            ([ECDSA, &[3, 4]].concat(), Some(64)),
            ([ECDSA, &[3, 9]].concat(), None),
        ] {
            let algorithm = wrapped(SEQUENCE, &[&wrapped(OBJECT_IDENTIFIER, &[&oid])]);
            let whole = wrapped(SEQUENCE, &[&wrapped(SEQUENCE, &[]), &algorithm]);
            assert_eq!(end_point(&whole).map(|hash| hash.len()), bytes, "{oid:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), at in 0usize..400, to in any::<u8>()) {
            let _ = (common_name(&bytes), end_point(&bytes));
            let mut damaged = with_two_names(b"alice", b"root");
            let at = at % damaged.len();
            damaged[at] = to;
            let _ = (common_name(&damaged), end_point(&damaged));
            let _ = (common_name(&damaged[..at]), end_point(&damaged[..at]));
        }
    }
}
