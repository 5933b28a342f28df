//! A machine without a model: its tokens are a function of the text alone, its pages are counted, and it panics where a
//! scheduler breaks its word.

use models::engine::{Drawn, Executor, Held, Limits, TextId};
use models::{Error, Result, Sampling};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::Duration;

/// Pages of a token's first page in all heads.
pub const UNIT: usize = 3;
const PAGE_SIZE: usize = 16;
pub const VOCABULARY: u32 = 97;
/// A context that begins with this token fails while it is read.
pub const UNREADABLE: u32 = 95;
/// A text whose question ends with this token draws three tokens and then has no scores.
pub const POISON: u32 = 96;

#[derive(Debug)]
pub struct Fake {
    pub limits: Limits,
    /// Of 100 tokens, how many stay.
    pub keep: usize,
    /// Tokens come one step late, and bounds are loose.
    pub late: bool,
    /// How long a step takes.
    pause: Duration,
    /// Everything fails from now on.
    pub lost: bool,
    pub steps: usize,
    texts: BTreeMap<TextId, Text>,
    begun: u64,
    /// Drawn in earlier steps.
    known: Vec<Drawn>,
    /// Drawn in the last one.
    under_way: Vec<Drawn>,
    /// What the last step could have taken and did not.
    unsettled: usize,
    /// Dropped with the machine.
    alive: Option<Box<dyn Debug>>,
}

#[derive(Debug, Default)]
struct Text {
    /// All tokens, read and written.
    tokens: Vec<u32>,
    /// Read and pruned before the others; later tokens all stay.
    context: usize,
    /// To be read, and how much of it is.
    reading: Option<(Vec<u32>, usize)>,
    /// The first of `tokens` that were read, and the seed: what tokens depend on.
    prompt: usize,
    seed: Option<u64>,
    drawn: u32,
    own: usize,
    shared: Vec<Rc<usize>>,
    suspended: bool,
}

/// What a request gets, alone or not.
pub fn token(context_and_question: &[u32], seed: u64, index: u32) -> u32 {
    let mut hasher = DefaultHasher::new();
    (context_and_question, seed, index).hash(&mut hasher);
    (hasher.finish() % u64::from(VOCABULARY)) as u32
}

impl Text {
    /// Pages of what is kept once `more` tokens are written.
    fn wanted(&self, keep: usize, more: usize) -> usize {
        let kept = (self.context * keep).div_ceil(100) + self.tokens.len() - self.context;
        UNIT * (kept + more).div_ceil(PAGE_SIZE)
    }

    /// Whether nobody else holds what was once shared, copies of which are merged then.
    fn merged(&self) -> bool {
        !self.shared.is_empty() && self.shared.iter().all(|pages| Rc::strong_count(pages) == 1)
    }

    fn held(&self, keep: usize) -> usize {
        if self.merged() {
            return self.wanted(keep, 0);
        }
        self.own + self.shared.iter().map(|pages| **pages).sum::<usize>()
    }

    /// Pages that writing `more` tokens takes: new ones, and a copy of a page of each head.
    fn growth(&self, keep: usize, more: usize) -> usize {
        let copies =
            if self.own == 0 && !self.shared.is_empty() && !self.merged() { UNIT } else { 0 };
        let held = self.held(keep).max(self.wanted(keep, 0));
        (self.wanted(keep, more) + copies).saturating_sub(held)
    }

    fn write(&mut self, keep: usize, more: usize) {
        if self.merged() {
            self.own = self.wanted(keep, 0);
            self.shared.clear();
        }
        self.own += self.growth(keep, more);
    }
}

impl Fake {
    pub fn new(pages: usize) -> Self {
        let limits = Limits {
            pages,
            seats: 8,
            batch: 4,
            tokens: 4096,
            question: 64,
            vocabulary: VOCABULARY as usize,
        };
        Self {
            limits,
            keep: 100,
            late: false,
            pause: Duration::ZERO,
            lost: false,
            steps: 0,
            texts: BTreeMap::new(),
            begun: 0,
            known: Vec::new(),
            under_way: Vec::new(),
            unsettled: 0,
            alive: None,
        }
    }

    /// One whose steps take `pause`, and that holds `alive`.
    pub fn slow(pause: Duration, alive: impl Debug + 'static) -> Self {
        let mut fake = Self::new(1000);
        fake.pause = pause;
        fake.alive = Some(Box::new(alive));
        fake
    }

    pub fn texts(&self) -> usize {
        self.texts.len()
    }

    pub fn used(&self) -> usize {
        let mut seen = HashSet::new();
        let mut used = 0;
        for text in self.texts.values() {
            if text.merged() {
                used += text.wanted(self.keep, 0);
                continue;
            }
            let shared = text.shared.iter().filter(|pages| seen.insert(Rc::as_ptr(pages)));
            used += text.own + shared.map(|pages| **pages).sum::<usize>();
        }
        used
    }

    fn check(&self) -> Result<()> {
        assert!(self.used() <= self.limits.pages, "took pages that are not there");
        let seats = self.texts.values().filter(|text| !text.suspended).count();
        assert!(seats <= self.limits.seats, "{seats} seats");
        if self.lost { Err(Error::EngineStopped) } else { Ok(()) }
    }

    fn text(&mut self, text: TextId) -> &mut Text {
        self.texts.get_mut(&text).expect("a text that was released")
    }

    fn placed(&mut self, text: TextId) -> &mut Text {
        let text = self.text(text);
        assert!(!text.suspended, "a call for a suspended text");
        text
    }

    fn add(&mut self, text: Text) -> TextId {
        self.begun += 1;
        self.texts.insert(TextId(self.begun), text);
        TextId(self.begun)
    }

    fn write(&mut self, text: TextId) {
        let poisoned = |text: &Text| text.tokens[text.prompt - 1] == POISON && text.drawn == 3;
        let found = self.placed(text);
        let seed = found.seed.expect("a step before the first draw");
        let token = if poisoned(found) {
            Err(Error::NoLogits)
        } else {
            Ok(token(&found.tokens[..found.prompt], seed, found.drawn))
        };
        found.drawn += 1;
        self.under_way.push(Drawn { text, token });
        if !self.late {
            self.known.append(&mut self.under_way);
        }
    }
}

impl Executor for Fake {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn free_pages(&self) -> usize {
        (self.limits.pages - self.used()).saturating_sub(self.unsettled)
    }

    fn most_pages(&self, tokens: usize) -> usize {
        UNIT * (tokens.div_ceil(PAGE_SIZE) + if self.late { 2 } else { 0 })
    }

    fn pages_to_read(&self, text: TextId) -> usize {
        let text = &self.texts[&text];
        let Some((tokens, done)) = &text.reading else { return 0 };
        if text.context == 0 {
            return UNIT * tokens.len().div_ceil(PAGE_SIZE) - UNIT * done.div_ceil(PAGE_SIZE);
        }
        text.growth(self.keep, tokens.len())
    }

    fn pages_to_step(&self, text: TextId) -> usize {
        if self.late { 2 * UNIT } else { self.texts[&text].growth(self.keep, 1) }
    }

    fn pages(&self, text: TextId) -> usize {
        let text = &self.texts[&text];
        if text.suspended { text.wanted(self.keep, 0) } else { text.held(self.keep) }
    }

    fn begin(&mut self) -> Result<TextId> {
        let text = self.add(Text::default());
        self.check().map(|()| text)
    }

    fn read(&mut self, text: TextId, tokens: &[u32]) -> Result<()> {
        assert!(!tokens.is_empty());
        let text = self.placed(text);
        assert!(text.reading.is_none() && text.drawn == 0);
        text.reading = Some((tokens.to_vec(), 0));
        self.check()
    }

    fn advance(&mut self, text: TextId, budget: usize) -> Result<bool> {
        assert!(budget > 0);
        let keep = self.keep;
        let found = self.placed(text);
        let (tokens, done) = found.reading.take().expect("nothing to read");
        if found.context == 0 && tokens[0] == UNREADABLE {
            return Err(Error::PositionNotFinite { layer: 0 });
        }
        if found.context > 0 {
            found.write(keep, tokens.len());
            found.tokens.extend(tokens);
        } else if done + budget < tokens.len() {
            found.own = UNIT * (done + budget).div_ceil(PAGE_SIZE);
            found.reading = Some((tokens, done + budget));
            return self.check().map(|()| false);
        } else {
            // All is there before it is pruned.
            found.own = UNIT * tokens.len().div_ceil(PAGE_SIZE);
            found.context = tokens.len();
            found.tokens = tokens;
        }
        found.prompt = found.tokens.len();
        self.check()?;
        let found = self.placed(text);
        if found.shared.is_empty() {
            found.own = found.wanted(keep, 0);
        }
        Ok(true)
    }

    fn draw(&mut self, text: TextId, sampling: &Sampling) -> Result<()> {
        let found = self.placed(text);
        assert!(found.reading.is_none() && found.prompt > 0 && found.seed.is_none());
        found.seed = Some(sampling.seed);
        self.write(text);
        self.check()
    }

    fn step(&mut self, batch: &[TextId]) -> Result<()> {
        assert!((1..=self.limits.batch).contains(&batch.len()));
        assert_eq!(batch.iter().collect::<HashSet<_>>().len(), batch.len(), "a text stands twice");
        self.known.append(&mut self.under_way);
        std::thread::sleep(self.pause);
        self.steps += 1;
        let promised = batch.iter().map(|&text| self.pages_to_step(text)).sum::<usize>();
        let before = self.used();
        for &text in batch {
            let keep = self.keep;
            let found = self.placed(text);
            found.write(keep, 1);
            // Which token it reads does not matter here, but how many it has.
            found.tokens.push(0);
            self.write(text);
        }
        let taken = self.used() - before;
        assert!(taken <= promised, "the fake breaks its own word");
        self.unsettled = if self.late { promised - taken } else { 0 };
        self.check()
    }

    fn drawn(&mut self, wait: bool) -> Result<Vec<Drawn>> {
        if wait {
            self.known.append(&mut self.under_way);
            self.unsettled = 0;
        }
        self.check()?;
        Ok(std::mem::take(&mut self.known))
    }

    fn fork(&mut self, text: TextId) -> Result<TextId> {
        let found = self.placed(text);
        assert!(found.reading.is_none() && found.prompt > 0 && found.seed.is_none());
        if found.own > 0 {
            found.shared.push(Rc::new(std::mem::take(&mut found.own)));
        }
        let fork = Text {
            tokens: found.tokens.clone(),
            context: found.context,
            prompt: found.prompt,
            shared: found.shared.clone(),
            ..Text::default()
        };
        let fork = self.add(fork);
        self.check().map(|()| fork)
    }

    fn suspend(&mut self, text: TextId) -> Result<usize> {
        let keep = self.keep;
        let found = self.placed(text);
        assert!(found.reading.is_none());
        let bytes = found.held(keep);
        (found.own, found.suspended) = (0, true);
        found.shared.clear();
        self.check().map(|()| bytes)
    }

    fn resume(&mut self, text: TextId) -> Result<()> {
        let keep = self.keep;
        let found = self.text(text);
        assert!(found.suspended);
        found.suspended = false;
        found.own = found.wanted(keep, 0);
        self.check()
    }

    fn release(&mut self, text: TextId) -> Result<()> {
        self.texts.remove(&text).expect("released twice");
        self.known.retain(|drawn| drawn.text != text);
        self.under_way.retain(|drawn| drawn.text != text);
        self.check()
    }

    fn held(&mut self, text: TextId) -> Result<Held> {
        let keep = self.keep;
        let pages = self.placed(text).held(keep);
        self.check()?;
        Ok(Held { pages, rows: pages, dense_rows: pages })
    }
}
