//! Makes a template pay for the lists it builds. The engine charges fuel for all that a template
//! does but two things. A list added to a list costs nothing until the sums are 33 deep; then all
//! their items are copied at once, and `x + x` 33 times over is 2^33 items. And a list that holds
//! another twice costs two slots, but `[x, x]` 45 times over is a text of 2^45 items, or a
//! comparison of as many. So before a template is compiled,
//! - the operands of every `+` that may add lists are passed through a function that charges their
//!   lengths: `a + b.c` becomes `charged(a) + charged(b.c)`;
//! - what goes into a list, a tuple, a map or a namespace is passed through one that charges all
//!   that is in it, however deep: `[x, x]` becomes `[counted(x), counted(x)]`.
//!
//! An operand reaches from the last to the next operator that binds no tighter than `+`: in Jinja,
//! `~`, `*`, filters, tests and lookups bind tighter. A sum with a text or a number on one side is
//! left alone: that can't add lists. Filters that nest lists by themselves
//! are taken out of the environment.

use super::lexer::{Kind, Part, parts, tags};
use std::ops::Range;

/// Charges an operand for its items.
pub(super) const CHARGED: &str = "__charged";
/// Charges an element for everything in it.
pub(super) const COUNTED: &str = "__counted";

/// Filters that nest or add lists without fuel and are no part of what chat templates use.
pub(super) const FREE_FILTERS: [&str; 6] = ["sum", "chain", "zip", "batch", "slice", "groupby"];

/// Words that end an operand.
const WORDS: [&str; 22] = [
    "and",
    "or",
    "if",
    "else",
    "elif",
    "in",
    "not",
    "for",
    "set",
    "recursive",
    "call",
    "filter",
    "macro",
    "with",
    "do",
    "block",
    "include",
    "import",
    "from",
    "extends",
    "as",
    "autoescape",
];

/// Texts to insert, each before a byte of the source; of those at one place, the first given first.
type Insertions = Vec<(usize, &'static str)>;

/// The template with calls that charge; lines stay where they are.
pub(super) fn charge(source: &str) -> String {
    let mut inserted = Insertions::new();
    for tag in tags(source) {
        let parts = parts(source, tag);
        charge_assignment(source, &parts, &mut inserted);
        for at in 0..parts.len() {
            charge_elements(source, &parts, at, &mut inserted);
        }
        for at in 0..parts.len() {
            charge_sum(source, &parts, at, &mut inserted);
        }
        for at in 0..parts.len() {
            charge_product(source, &parts, at, &mut inserted);
        }
    }
    inserted.sort_by_key(|(at, _)| *at);
    let mut rewritten = String::with_capacity(source.len());
    let mut done = 0;
    for (at, text) in inserted {
        rewritten.push_str(&source[done..at]);
        rewritten.push_str(text);
        done = at;
    }
    rewritten.push_str(&source[done..]);
    rewritten
}

fn wrap(parts: &[Part], operand: &Range<usize>, call: &'static str, inserted: &mut Insertions) {
    inserted.push((parts[operand.start].place.start, call));
    inserted.push((parts[operand.end - 1].place.end, ")"));
}

/// `set a.b = value`, whose value goes into a namespace, and `set a = x, y`, a tuple without
/// brackets. A sum's operands are charged already, and hold no namespace.
fn charge_assignment(source: &str, parts: &[Part], inserted: &mut Insertions) {
    let text = |at: usize| parts.get(at).map_or("", |part| &source[part.place.clone()]);
    let set = usize::from(matches!(text(0), "-" | "+"));
    let mut depth = 0i64;
    let equals = parts.iter().position(|part| {
        depth += i64::from(part.kind == Kind::Open) - i64::from(part.kind == Kind::Close);
        depth == 0 && &source[part.place.clone()] == "="
    });
    let Some(equals) = equals.filter(|_| text(set) == "set") else { return };
    let end = parts.len() - usize::from(matches!(text(parts.len() - 1), "-" | "+"));
    let values = elements(source, parts, equals + 1..end);
    let attribute = (set..equals).any(|at| text(at) == ".");
    for value in values.iter().filter(|_| attribute || values.len() > 1) {
        let part_of_sum = is_sum(source, &parts[value.clone()]);
        if !value.is_empty() && !part_of_sum && !is_literal(source, &parts[value.clone()]) {
            wrap(parts, value, "__counted(", inserted);
        }
    }
}

/// What commas outside of brackets separate.
fn elements(source: &str, parts: &[Part], within: Range<usize>) -> Vec<Range<usize>> {
    let (mut found, mut start, mut depth) = (Vec::new(), within.start, 0i64);
    for at in within.clone() {
        depth += i64::from(parts[at].kind == Kind::Open) - i64::from(parts[at].kind == Kind::Close);
        if depth == 0 && &source[parts[at].place.clone()] == "," {
            found.push(start..at);
            start = at + 1;
        }
    }
    found.push(start..within.end);
    found
}

/// Whether an expression is a sum and nothing looser, such as a choice of which one branch is one.
fn is_sum(source: &str, expression: &[Part]) -> bool {
    let (mut depth, mut sums) = (0i64, false);
    for part in expression {
        depth += i64::from(part.kind == Kind::Open) - i64::from(part.kind == Kind::Close);
        let text = &source[part.place.clone()];
        sums |= depth == 0 && text == "+";
        if depth == 0 && part.kind == Kind::Name && matches!(text, "if" | "else" | "or" | "and") {
            return false;
        }
    }
    sums
}

/// A product, which may repeat a list: all factors of the chain that a `*` is in.
fn charge_product(source: &str, parts: &[Part], at: usize, inserted: &mut Insertions) {
    let text = |at: usize| &source[parts[at].place.clone()];
    let is_operator = |at: usize| matches!(text(at), "*" | "/" | "%");
    if text(at) != "*" || at == 0 || is_operator(at - 1) {
        return;
    }
    let joins = |at: usize| is_operator(at) || matches!(text(at), "." | "|");
    let ends = |at: usize| match parts[at].kind {
        // A sign, not a difference.
        Kind::Mark if at > 0 && matches!(text(at), "-" | "+") && is_operator(at - 1) => false,
        Kind::Mark => !joins(at),
        _ => ends_operand(source, parts, at),
    };
    let (left, right) = (before(parts, at, ends), after(parts, at, ends));
    let mut depth = 0i64;
    let is_later = left.clone().any(|at| {
        depth += i64::from(parts[at].kind == Kind::Open) - i64::from(parts[at].kind == Kind::Close);
        depth == 0 && text(at) == "*"
    });
    // Without a left factor it unpacks arguments.
    if !is_later && !left.is_empty() && !is_operator(left.start) && !right.is_empty() {
        wrap(parts, &(left.start..right.end), "__counted(", inserted);
    }
}

/// What stands between the brackets that open at a part, if they make a list, a tuple, a map or a
/// namespace.
fn charge_elements(source: &str, parts: &[Part], at: usize, inserted: &mut Insertions) {
    if parts[at].kind != Kind::Open || !makes_container(source, parts, at) {
        return;
    }
    let text = |at: usize| &source[parts[at].place.clone()];
    let (mut depth, mut start) = (0usize, at + 1);
    for end in at + 1..parts.len() {
        let closes = parts[end].kind == Kind::Close && depth == 0;
        match parts[end].kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            // What comes before is a map's key or an argument's name.
            Kind::Mark if depth == 0 && separates(source, parts, end) => start = end + 1,
            _ => {}
        }
        if closes || (depth == 0 && text(end) == ",") {
            let element = start..end;
            if !element.is_empty() && !is_literal(source, &parts[element.clone()]) {
                wrap(parts, &element, "__counted(", inserted);
            }
            start = end + 1;
        }
        if closes {
            return;
        }
    }
}

/// Whether a part stands between a key and its value: a colon, or `=` that is no comparison's.
fn separates(source: &str, parts: &[Part], at: usize) -> bool {
    let byte = |at: usize| source.as_bytes().get(at).copied().unwrap_or(b' ');
    let place = parts[at].place.start;
    let compares = |byte: u8| matches!(byte, b'=' | b'!' | b'<' | b'>');
    match byte(place) {
        b'=' => !compares(byte(place - 1)) && !compares(byte(place + 1)),
        mark => mark == b':',
    }
}

/// Whether brackets that open here have a comma of their own.
fn has_comma(source: &str, parts: &[Part], at: usize) -> bool {
    let mut depth = 0usize;
    for part in &parts[at + 1..] {
        match part.kind {
            Kind::Open => depth += 1,
            Kind::Close if depth == 0 => return false,
            Kind::Close => depth -= 1,
            _ if depth == 0 && &source[part.place.clone()] == "," => return true,
            _ => {}
        }
    }
    false
}

/// Whether brackets hold elements: not an index, not a group, not a function's arguments.
fn makes_container(source: &str, parts: &[Part], at: usize) -> bool {
    let text = |at: usize| &source[parts[at].place.clone()];
    let before = at.checked_sub(1);
    let follows_value = before.is_some_and(|before| match parts[before].kind {
        Kind::Name => !WORDS.contains(&text(before)),
        Kind::Close | Kind::Text => true,
        _ => false,
    });
    match text(at) {
        "(" if follows_value => before.is_some_and(|at| matches!(text(at), "dict" | "namespace")),
        "[" => !follows_value,
        "(" => has_comma(source, parts, at),
        _ => true,
    }
}

fn charge_sum(source: &str, parts: &[Part], at: usize, inserted: &mut Insertions) {
    if &source[parts[at].place.clone()] != "+" {
        return;
    }
    let ends = |at: usize| ends_operand(source, parts, at);
    let (left, right) = (before(parts, at, ends), after(parts, at, ends));
    let is_scalar = |operand: &Range<usize>| match &parts[operand.clone()] {
        [only] => matches!(only.kind, Kind::Text | Kind::Number),
        other => other.is_empty(),
    };
    if is_scalar(&left) || is_scalar(&right) {
        return;
    }
    // In `a + b + c`, b is an operand twice and pays twice.
    for operand in [left, right] {
        if !is_literal(source, &parts[operand.clone()]) {
            wrap(parts, &operand, "__charged(", inserted);
        }
    }
}

/// A text, a number, or a list written out.
fn is_literal(source: &str, operand: &[Part]) -> bool {
    match operand {
        [only] => matches!(only.kind, Kind::Text | Kind::Number),
        [first, inside @ .., last] => {
            let list = &source[first.place.clone()] == "[" && last.kind == Kind::Close;
            list && is_balanced(inside)
        }
        [] => false,
    }
}

/// Whether brackets open and close in order, so that the ones around belong together.
fn is_balanced(parts: &[Part]) -> bool {
    let mut depth = 0i64;
    parts.iter().all(|part| {
        depth += i64::from(part.kind == Kind::Open) - i64::from(part.kind == Kind::Close);
        depth >= 0
    })
}

/// Whether a part ends an operand: an operator that binds no tighter than `+`, or a word.
fn ends_operand(source: &str, parts: &[Part], at: usize) -> bool {
    let text = |at: usize| &source[parts[at].place.clone()];
    match parts[at].kind {
        Kind::Mark => !matches!(text(at), "." | "|" | "~" | "*" | "/" | "%"),
        // `is not none`, `is in list`: tests bind tighter than sums.
        Kind::Name if matches!(text(at), "not" | "in") => {
            let before = at.checked_sub(1).map(text);
            !(before == Some("is") || (before == Some("not") && at > 1 && text(at - 2) == "is"))
        }
        // `loop.set`, `x | filter`: a name after a dot or a bar is no word of the language.
        Kind::Name => {
            let looked_up = at > 0 && matches!(text(at - 1), "." | "|");
            !looked_up && WORDS.contains(&text(at))
        }
        _ => false,
    }
}

/// The parts of the operand that ends before `at`.
fn before(parts: &[Part], at: usize, ends: impl Fn(usize) -> bool) -> Range<usize> {
    let (mut start, mut depth) = (at, 0usize);
    while start > 0 {
        let part = &parts[start - 1];
        match part.kind {
            Kind::Close => depth += 1,
            Kind::Open if depth == 0 => break,
            Kind::Open => depth -= 1,
            _ if depth == 0 && ends(start - 1) => break,
            _ => {}
        }
        start -= 1;
    }
    start..at
}

/// The parts of the operand that starts behind `at`.
fn after(parts: &[Part], at: usize, ends: impl Fn(usize) -> bool) -> Range<usize> {
    let (mut end, mut depth) = (at + 1, 0usize);
    while end < parts.len() {
        match parts[end].kind {
            Kind::Open => depth += 1,
            Kind::Close if depth == 0 => break,
            Kind::Close => depth -= 1,
            _ if depth == 0 && ends(end) => break,
            _ => {}
        }
        end += 1;
    }
    at + 1..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_that_may_be_lists_are_charged() {
        let short = |text: &str| charge(text).replace(CHARGED, "$").replace(COUNTED, "#");
        for (source, wanted) in [
            ("a + b {# {{ a + b }} #}", "a + b {# {{ a + b }} #}"),
            ("{{ 'x' + y + \"z + w\" }}", "{{ 'x' + y + \"z + w\" }}"),
            ("{{ a + b.c }}", "{{ $(a) + $(b.c) }}"),
            ("{{- x|f(1)~q + y[1:] -}}", "{{- $(x|f(1)~q) + $(y[1:]) -}}"),
            ("{% set n.x = n.x + [m] %}", "{% set n.x = $(n.x) + [#(m)] %}"),
            ("{{ f((a == b), (a, b), x=c) }}", "{{ f((a == b), (#(a), #(b)), x=c) }}"),
            ("{%- set n.x = y.z -%}", "{%- set n.x = #(y.z) -%}"),
            ("{% set x = [x, 'a', x[0]] %}", "{% set x = [#(x), 'a', #(x[0])] %}"),
            ("{% set x = {'a': x, b: [y]} %}", "{% set x = {'a': #(x), b: [#(y)]} %}"),
            ("{% set x = namespace(a=x, b=1) %}", "{% set x = namespace(a=#(x), b=1) %}"),
            ("{% if x in ['a', y + z] %}", "{% if x in ['a', #($(y) + $(z))] %}"),
            ("{% set n.x = n.x + n.x %}", "{% set n.x = $(n.x) + $(n.x) %}"),
            ("{% if a is not none + b %}", "{% if $(a is not none) + $(b) %}"),
            ("{%- for i in a + b if c %}", "{%- for i in $(a) + $(b) if c %}"),
            ("{{ f(a + b, c + d)['}}'] }}", "{{ f($(a) + $(b), $(c) + $(d))['}}'] }}"),
            ("{% raw %}{{ a + b }}{% endraw %}", "{% raw %}{{ a + b }}{% endraw %}"),
            ("{{ a + b + c }}", "{{ $(a) + $($(b)) + $(c) }}"),
            ("{%+ if x.y * 2 + z > 3 +%}", "{%+ if $(#(x.y * 2)) + $(z) > 3 +%}"),
            ("{% set x | f(a=b, c=d) %}", "{% set x | f(a=b, c=d) %}"),
            ("{% set x = x, y -%}", "{% set x = #(x), #(y) -%}"),
            ("{% set n.x = 0 if a else n %}", "{% set n.x = #(0 if a else n) %}"),
            ("{% set n.x, m = n, n %}", "{% set n.x, m = #(n), #(n) %}"),
            ("{{ [x] * n * -2 - 1 }}", "{{ #([#(x)] * n * -2) - 1 }}"),
            ("{{ f(*a, **b) ~ -x ** 2 }}", "{{ f(*a, **b) ~ -#(x ** 2) }}"),
            ("{#} {{ ' #}{{ a + b }}", "{#} {{ ' #}{{ $(a) + $(b) }}"),
            ("{%+ raw %}{# {% endraw %}{{ a + b }}", "{%+ raw %}{# {% endraw %}{{ $(a) + $(b) }}"),
        ] {
            assert_eq!(short(source), wanted, "{source}");
        }
    }
}
