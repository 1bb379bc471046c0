//! Characters, words and scripts of texts.

use serde::Serialize;
use unicode_script::{Script, UnicodeScript};

/// Number of characters by Unicode script.
#[derive(Debug, Clone, Default)]
pub(super) struct ScriptCounts(Vec<(Script, u64)>);

/// The characters of one script.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScriptShare {
    /// The script's name in Unicode, such as Latin or Han.
    pub script: &'static str,
    /// Number of characters.
    pub characters: u64,
    /// Fraction of the characters of all scripts.
    pub share: f64,
}

/// The size of one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TextSize {
    pub(super) characters: usize,
    /// Parts between white space that have a letter or a digit. In scripts that are written without spaces,
    /// every character is a word.
    pub(super) words: usize,
}

impl ScriptCounts {
    pub(super) fn merge(&mut self, other: &ScriptCounts) {
        other.0.iter().for_each(|&(script, characters)| self.add(script, characters));
    }

    fn add(&mut self, script: Script, characters: u64) {
        match self.0.iter_mut().find(|(known, _)| *known == script) {
            Some((_, sum)) => *sum += characters,
            None => self.0.push((script, characters)),
        }
    }

    /// The scripts in descending order of their characters. Spaces, digits, punctuation, symbols and
    /// combining marks, which belong to no particular script, are not counted.
    pub(super) fn shares(&self) -> Vec<ScriptShare> {
        let is_particular = |script| !matches!(script, Script::Common | Script::Inherited);
        let counts = || self.0.iter().filter(|(script, _)| is_particular(*script));
        let total: u64 = counts().map(|(_, characters)| characters).sum();
        let share = |&(script, characters): &(Script, u64)| ScriptShare {
            script: script.full_name(),
            characters,
            share: characters as f64 / total.max(1) as f64,
        };
        let mut shares: Vec<ScriptShare> = counts().map(share).collect();
        shares.sort_by(|a, b| b.characters.cmp(&a.characters).then(a.script.cmp(b.script)));
        shares
    }
}

/// Measures a text and counts the scripts of its characters.
pub(super) fn measure(text: &str, scripts: &mut ScriptCounts) -> TextSize {
    let (mut characters, mut words) = (0, 0);
    let (mut latin, mut common) = (0, 0);
    // Of the current part between white space.
    let (mut single, mut has_others) = (0, false);
    // Successive characters often have the same script.
    let mut run = (Script::Common, 0);
    for c in text.chars() {
        characters += 1;
        if c.is_ascii() {
            if c.is_ascii_alphabetic() {
                latin += 1;
            } else {
                common += 1;
            }
            if c.is_ascii_alphanumeric() {
                has_others = true;
                continue;
            }
        } else {
            let script = c.script();
            if script != run.0 {
                scripts.add(run.0, run.1);
                run = (script, 0);
            }
            run.1 += 1;
            if c.is_alphanumeric() {
                if is_written_without_spaces(script) {
                    single += 1;
                } else {
                    has_others = true;
                }
                continue;
            }
        }
        if c.is_whitespace() {
            words += std::mem::take(&mut single) + usize::from(std::mem::take(&mut has_others));
        }
    }
    words += single + usize::from(has_others);
    for (script, characters) in [run, (Script::Latin, latin), (Script::Common, common)] {
        if characters > 0 {
            scripts.add(script, characters);
        }
    }
    TextSize { characters, words }
}

fn is_written_without_spaces(script: Script) -> bool {
    matches!(
        script,
        Script::Han
            | Script::Hiragana
            | Script::Katakana
            | Script::Thai
            | Script::Lao
            | Script::Khmer
            | Script::Myanmar
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(text: &str) -> (usize, usize) {
        let TextSize { characters, words } = measure(text, &mut ScriptCounts::default());
        (characters, words)
    }

    #[test]
    fn words_have_a_letter_or_a_digit() {
        for (text, expected) in [
            ("", (0, 0)),
            (" … - \n", (6, 0)),
            ("e-mail", (6, 1)),
            ("the cat's 2 paws.", (17, 4)),
            ("Grüße an Ἀθήνα", (14, 3)),
            ("世界", (2, 2)),
            ("AI世界 です", (7, 5)),
            ("👍", (1, 0)),
        ] {
            assert_eq!(size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn scripts_are_counted_without_common_characters() {
        let mut scripts = ScriptCounts::default();
        measure("Tin, 世界! ", &mut scripts);
        let mut more = ScriptCounts::default();
        measure("Мир é", &mut more);
        scripts.merge(&more);
        let shares: Vec<_> = scripts.shares().iter().map(|s| (s.script, s.characters)).collect();
        assert_eq!(shares, [("Latin", 4), ("Cyrillic", 3), ("Han", 2)]);
        assert!((scripts.shares()[0].share - 4.0 / 9.0).abs() < 1e-9);
        assert!(ScriptCounts::default().shares().is_empty());
    }

    proptest! {
        #[test]
        fn every_character_is_counted_once(text: String) {
            let mut scripts = ScriptCounts::default();
            let size = measure(&text, &mut scripts);
            prop_assert_eq!(size.characters, text.chars().count());
            prop_assert_eq!(scripts.0.iter().map(|(_, n)| *n as usize).sum::<usize>(), size.characters);
            prop_assert_eq!(size.words == 0, !text.contains(char::is_alphanumeric));
        }
    }
}
