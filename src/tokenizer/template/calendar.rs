//! Dates for templates that print today's, in UTC.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Day 0 of 1970 was a Thursday.
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A day of the proleptic Gregorian calendar.
struct Date {
    year: u64,
    /// From 1.
    month: u64,
    /// From 1.
    day: u64,
}

/// Days since 1970-01-01 to a date (H. Hinnant, "chrono-compatible low-level date algorithms"):
/// years are counted from March, so that the leap day is a year's last.
fn date(days: u64) -> Date {
    let days = days + 719_468; // since 0000-03-01
    let era = days / 146_097; // 400 years
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + 400 * era + u64::from(month <= 2);
    Date { year, month, day }
}

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 256;

/// Formats a time as C's `strftime` does, or says which directive is not known.
pub(super) fn format(pattern: &str, unix_s: u64) -> Result<String, String> {
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(format!("strftime_now: a pattern has at most {PATTERN_BYTES_MAX} bytes"));
    }
    let (days, second_of_day) = (unix_s / 86_400, unix_s % 86_400);
    let Date { year, month, day } = date(days);
    let (hour, minute, second) =
        (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(days % 7) as usize];
    let mut text = String::new();
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let directive = characters.next();
        text.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let name = other.map_or_else(String::new, String::from);
                return Err(format!("strftime_now: %{name} is not known"));
            }
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendar_s() {
        let spell = |unix_s| format("%A %d %B %Y, %F %T %I %p", unix_s).expect("known directives");
        assert_eq!(spell(0), "Thursday 01 January 1970, 1970-01-01 00:00:00 12 AM");
        assert_eq!(spell(951_868_799), "Tuesday 29 February 2000, 2000-02-29 23:59:59 11 PM");
        assert_eq!(spell(1_764_547_200), "Monday 01 December 2025, 2025-12-01 00:00:00 12 AM");
        assert!(format("%Q", 0).is_err());
    }
}
