//! The course's enum and composite as applications write such types for the drivers of Rust.
//!
//! Invariant: what a type's number is comes from the driver, as it does where these are derived.

use std::error::Error;

use bytes::{Buf, BufMut, BytesMut};
use sqlx::Postgres;
use sqlx::encode::IsNull as SqlxNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::{PgRecordDecoder, PgRecordEncoder};
use sqlx::postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueRef};
use tokio_postgres::types::{FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};

/// The enum, by its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mood(pub(crate) String);

/// The composite that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) street: String,
    pub(crate) mood: Mood,
}

type Sure<T> = Result<T, Box<dyn Error + Sync + Send>>;

impl ToSql for Mood {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Sure<IsNull> {
        out.put_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(ty.kind(), Kind::Enum(_))
    }

    to_sql_checked!();
}

impl FromSql<'_> for Mood {
    fn from_sql(_: &Type, raw: &[u8]) -> Sure<Mood> {
        Ok(Mood(std::str::from_utf8(raw)?.to_owned()))
    }

    fn accepts(ty: &Type) -> bool {
        <Mood as ToSql>::accepts(ty)
    }
}

impl ToSql for Spot {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Sure<IsNull> {
        let Kind::Composite(fields) = ty.kind() else { return Err("no composite".into()) };
        out.put_i32(i32::try_from(fields.len())?);
        for (field, text) in fields.iter().zip([&self.street, &self.mood.0]) {
            out.put_u32(field.type_().oid());
            out.put_i32(i32::try_from(text.len())?);
            out.put_slice(text.as_bytes());
        }
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(ty.kind(), Kind::Composite(_))
    }

    to_sql_checked!();
}

impl FromSql<'_> for Spot {
    fn from_sql(ty: &Type, mut raw: &[u8]) -> Sure<Spot> {
        let Kind::Composite(fields) = ty.kind() else { return Err("no composite".into()) };
        let count = raw.try_get_i32()?;
        let mut texts = Vec::new();
        for field in fields {
            let (oid, length) = (raw.try_get_u32()?, usize::try_from(raw.try_get_i32()?)?);
            if oid != field.type_().oid() {
                // As postgres-derive refuses it.
                return Err(format!("field {} has type {oid}, not {}", field.name(), field.type_().oid()).into());
            }
            let text = raw.get(..length).ok_or("cut off")?;
            texts.push(std::str::from_utf8(text)?.to_owned());
            raw.advance(length);
        }
        let [street, mood] = <[String; 2]>::try_from(texts).map_err(|_| format!("{count} fields"))?;
        Ok(Spot { street, mood: Mood(mood) })
    }

    fn accepts(ty: &Type) -> bool {
        <Spot as ToSql>::accepts(ty)
    }
}

impl sqlx::Type<Postgres> for Mood {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("mood")
    }
}

impl PgHasArrayType for Mood {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::array_of("mood")
    }
}

impl sqlx::Encode<'_, Postgres> for Mood {
    fn encode_by_ref(&self, out: &mut PgArgumentBuffer) -> Result<SqlxNull, BoxDynError> {
        <&str as sqlx::Encode<Postgres>>::encode(&self.0, out)
    }
}

impl sqlx::Decode<'_, Postgres> for Mood {
    fn decode(value: PgValueRef<'_>) -> Result<Mood, BoxDynError> {
        Ok(Mood(value.as_str()?.to_owned()))
    }
}

impl sqlx::Type<Postgres> for Spot {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("spot")
    }
}

impl sqlx::Encode<'_, Postgres> for Spot {
    fn encode_by_ref(&self, out: &mut PgArgumentBuffer) -> Result<SqlxNull, BoxDynError> {
        let mut encoder = PgRecordEncoder::new(out);
        encoder.encode(&self.street)?;
        encoder.encode(&self.mood)?;
        encoder.finish();
        Ok(SqlxNull::No)
    }
}

impl sqlx::Decode<'_, Postgres> for Spot {
    fn decode(value: PgValueRef<'_>) -> Result<Spot, BoxDynError> {
        let mut decoder = PgRecordDecoder::new(value)?;
        Ok(Spot { street: decoder.try_decode()?, mood: decoder.try_decode()? })
    }
}
