//! RFC 3339 times, written by hand because each record has up to three of them: a calendar library
//! took longer than the rest of a record.

/// Writes times; remembers the last day's date, which nearly all times share.
#[derive(Debug, Default)]
pub(super) struct Rfc3339 {
    day: u64,
    date: [u8; 10],
}

const DAY: u64 = 86_400;

impl Rfc3339 {
    /// `2026-11-22T14:02:11.000000001Z`; from 1970 to the end of `u64`, which is in 2554.
    #[inline]
    pub(super) fn write(&mut self, nanoseconds: u64) -> [u8; 30] {
        let (seconds, nanos) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
        let (day, second) = (seconds / DAY, (seconds % DAY) as u32);
        if day != self.day || self.date[0] == 0 {
            self.day = day;
            self.date = date(day);
        }
        let mut out = *b"0000-00-00T00:00:00.000000000Z";
        out[..10].copy_from_slice(&self.date);
        two_digits(&mut out[11..13], second / 3600);
        two_digits(&mut out[14..16], second / 60 % 60);
        two_digits(&mut out[17..19], second % 60);
        let nanos = nanos as u32;
        two_digits(&mut out[20..22], nanos / 10_000_000);
        two_digits(&mut out[22..24], nanos / 100_000 % 100);
        two_digits(&mut out[24..26], nanos / 1_000 % 100);
        let rest = nanos % 1_000;
        two_digits(&mut out[26..28], rest / 10);
        out[28] = b'0' + (rest % 10) as u8;
        out
    }
}

/// `"00"` to `"99"`.
static PAIRS: [[u8; 2]; 100] = {
    let mut pairs = [[0; 2]; 100];
    let mut value = 0;
    while value < 100 {
        pairs[value] = [b'0' + (value / 10) as u8, b'0' + (value % 10) as u8];
        value += 1;
    }
    pairs
};

#[inline]
fn two_digits(out: &mut [u8], value: u32) {
    out[..2].copy_from_slice(&PAIRS[value as usize]);
}

/// The Gregorian date of a day since 1970-01-01, by eras of 400 years that begin in March, so that
/// the leap day is the last of its year.
fn date(day: u64) -> [u8; 10] {
    let day = day + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let mut out = *b"0000-00-00";
    two_digits(&mut out[0..2], (year / 100) as u32);
    two_digits(&mut out[2..4], (year % 100) as u32);
    two_digits(&mut out[5..7], month as u32);
    two_digits(&mut out[8..10], day_of_month as u32);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn agrees_with_a_calendar_library(times in proptest::collection::vec(proptest::num::u64::ANY, 1..4)) {
            let mut writer = Rfc3339::default();
            for time in times {
                let expected = jiff::Timestamp::from_nanosecond(time.into()).unwrap();
                let ours = writer.write(time);
                proptest::prop_assert_eq!(std::str::from_utf8(&ours).unwrap(), format!("{expected:.9}"));
            }
        }
    }

    #[test]
    fn the_first_day_needs_no_earlier_call() {
        assert_eq!(&Rfc3339::default().write(1), b"1970-01-01T00:00:00.000000001Z");
    }
}
