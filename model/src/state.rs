//! One state of the whole system, and its packed form.
//!
//! Invariant: `State::unpack(state.pack(), shape) == state` for every state within [`PROXIES_MAX`] and [`EPOCHS_MAX`].

/// More proxies do not fit the packed form.
pub const PROXIES_MAX: usize = 4;
/// More epochs do not fit the packed form.
pub const EPOCHS_MAX: usize = 4;
/// A crash budget of this size is not counted: any number of crashes.
pub const CRASHES_ANY: u8 = 7;

/// One of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first source.
    Blue,
    /// The first target.
    Green,
}

impl Side {
    /// The other server.
    pub const fn other(self) -> Self {
        match self {
            Self::Blue => Self::Green,
            Self::Green => Self::Blue,
        }
    }

    /// Its place in an array.
    pub const fn index(self) -> usize {
        match self {
            Self::Blue => 0,
            Self::Green => 1,
        }
    }
}

/// What was decided for an epoch, on its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing yet.
    Undecided,
    /// The target owns the database.
    Commit,
    /// The source keeps it.
    Abort,
}

/// A message or statement of a controller that, once sent, may arrive at any time and any number of times.
///
/// PAUSE is not among them: it goes out with the opening of its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// `flip` on the source.
    Flip,
    /// `guard` on the target.
    Guard,
    /// `unfence` on the source.
    Unfence,
    /// `decide(commit)` on the source.
    Commit,
    /// `decide(abort)` on the source.
    Abort,
    /// SWITCH to the proxies.
    Switch,
    /// RESUME to the proxies.
    Resume,
}

/// One epoch: a row of `state` on its source, its decision there, its evidence on the target, and what was sent for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch {
    /// Where it was opened; the other side is its target.
    pub source: Side,
    /// The row of `decision` on the source.
    pub outcome: Outcome,
    /// The row of `evidence` on the target: a commit was decided.
    pub evidence: bool,
    sent: u8,
}

impl Epoch {
    /// Whether this message was ever sent.
    pub const fn was_sent(&self, message: Sent) -> bool {
        self.sent & (1 << message as u8) != 0
    }

    /// Notes a message as sent.
    pub const fn send(&mut self, message: Sent) {
        self.sent |= 1 << message as u8;
    }
}

/// The gate trigger's function on one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The no-op, or no gate at all.
    Open,
    /// The source's form: shut until an abort of its epoch is visible.
    Fenced,
    /// The target's form: shut until evidence of a commit of its epoch or a newer one is visible.
    Target,
}

/// The gate of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// Which function it is.
    pub form: Form,
    /// The epoch the function names; 0 for [`Form::Open`].
    pub epoch: u8,
    /// Its expiry has passed. Only without R1.
    pub expired: bool,
}

/// What a proxy is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not running.
    Down,
    /// Running and registered, but it has not looked at its active backend yet: no client is served.
    Looking,
    /// Serving clients at its route.
    Serving,
    /// Paused at an epoch, drained.
    Held,
    /// Its lease ended: it asks for an abort and still holds.
    Asking,
}

/// One proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proxy {
    /// What it is doing.
    pub phase: Phase,
    /// The epoch it is held at; 0 unless held or asking.
    pub hold: u8,
    /// The hold has no lease. Only without R8 at start-up.
    pub leaseless: bool,
    /// Its active backend.
    pub route: Side,
    /// The epoch of its route.
    pub route_epoch: u8,
}

/// Where the controller is. One that crashed is `Idle`: it kept its journal and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// No run is going.
    Idle,
    /// S2: the epoch is open, PAUSE is out.
    Pausing,
    /// S3-S7: the fence is ordered.
    Fencing,
    /// S8: checks passed, `decide(commit)` is out.
    Deciding,
    /// It gave up or took up an old run: it asks for an abort.
    Aborting,
}

/// The controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Controller {
    /// Where it is.
    pub duty: Duty,
    /// The epoch of its run; 0 when idle.
    pub epoch: u8,
    /// How many more times it may crash; [`CRASHES_ANY`] is not counted.
    pub crashes_left: u8,
}

/// What the writer that goes past the proxies has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transaction {
    /// Nothing: its next statement is a READ COMMITTED transaction.
    None,
    /// A REPEATABLE READ snapshot, nothing written yet.
    Snapshot,
    /// It wrote and has not committed.
    Wrote,
}

/// The writer that goes past the proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer {
    /// What it has open.
    pub transaction: Transaction,
    /// On which side; blue when nothing is open.
    pub side: Side,
    /// The epochs whose rows of decision and evidence on that side its snapshot sees, a bit each.
    pub seen: u8,
}

/// How many proxies a state has. The known ones come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Proxies that the controller was told of.
    pub known: usize,
    /// Proxies that nobody told it of.
    pub strangers: usize,
    /// Epochs that may be opened.
    pub epochs: usize,
    /// Controller crashes; [`CRASHES_ANY`] for any number.
    pub crashes: u8,
}

/// The whole system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The last epoch that was opened; 0 for none.
    pub last: u8,
    /// Epoch `n` is at index `n - 1`.
    pub epochs: [Epoch; EPOCHS_MAX],
    /// Unused places keep their first value.
    pub proxies: [Proxy; PROXIES_MAX],
    /// By [`Side::index`].
    pub gates: [Gate; 2],
    /// The controller.
    pub controller: Controller,
    /// The writer past the proxies.
    pub writer: Writer,
    /// Whose the database is: blue, until a commit is decided on the owner.
    pub owner: Side,
}

impl State {
    /// Everything on blue, every proxy serving.
    pub const fn first(crashes: u8) -> Self {
        let epoch = Epoch { source: Side::Blue, outcome: Outcome::Undecided, evidence: false, sent: 0 };
        let proxy = Proxy { phase: Phase::Serving, hold: 0, leaseless: false, route: Side::Blue, route_epoch: 0 };
        let gate = Gate { form: Form::Open, epoch: 0, expired: false };
        Self {
            last: 0,
            epochs: [epoch; EPOCHS_MAX],
            proxies: [proxy; PROXIES_MAX],
            gates: [gate; 2],
            controller: Controller { duty: Duty::Idle, epoch: 0, crashes_left: crashes },
            writer: Writer { transaction: Transaction::None, side: Side::Blue, seen: 0 },
            owner: Side::Blue,
        }
    }

    /// The epoch of that number, from 1.
    pub const fn epoch(&self, number: u8) -> &Epoch {
        &self.epochs[number as usize - 1]
    }

    /// The epoch of that number, from 1.
    pub const fn epoch_mut(&mut self, number: u8) -> &mut Epoch {
        &mut self.epochs[number as usize - 1]
    }

    /// The numbers of the opened epochs, in order.
    pub fn opened(&self) -> impl DoubleEndedIterator<Item = u8> + use<> {
        1..=self.last
    }

    /// All of it in 128 bits.
    pub fn pack(&self) -> u128 {
        let mut bits = Bits::default();
        bits.put(3, self.last);
        for epoch in &self.epochs {
            bits.put(1, epoch.source as u8);
            bits.put(2, epoch.outcome as u8);
            bits.put(1, u8::from(epoch.evidence));
            bits.put(7, epoch.sent);
        }
        for proxy in &self.proxies {
            bits.put(3, proxy.phase as u8);
            bits.put(3, proxy.hold);
            bits.put(1, u8::from(proxy.leaseless));
            bits.put(1, proxy.route as u8);
            bits.put(3, proxy.route_epoch);
        }
        for gate in &self.gates {
            bits.put(2, gate.form as u8);
            bits.put(3, gate.epoch);
            bits.put(1, u8::from(gate.expired));
        }
        bits.put(3, self.controller.duty as u8);
        bits.put(3, self.controller.epoch);
        bits.put(3, self.controller.crashes_left);
        bits.put(2, self.writer.transaction as u8);
        bits.put(1, self.writer.side as u8);
        bits.put(4, self.writer.seen);
        bits.put(1, self.owner as u8);
        bits.word
    }

    /// The state that packs to these bits.
    pub fn unpack(word: u128) -> Self {
        let mut bits = Bits { word, at: 0 };
        let mut state = Self::first(0);
        state.last = bits.take(3);
        for epoch in &mut state.epochs {
            epoch.source = side(bits.take(1));
            epoch.outcome = [Outcome::Undecided, Outcome::Commit, Outcome::Abort][usize::from(bits.take(2))];
            epoch.evidence = bits.take(1) == 1;
            epoch.sent = bits.take(7);
        }
        for proxy in &mut state.proxies {
            proxy.phase = PHASES[usize::from(bits.take(3))];
            proxy.hold = bits.take(3);
            proxy.leaseless = bits.take(1) == 1;
            proxy.route = side(bits.take(1));
            proxy.route_epoch = bits.take(3);
        }
        for gate in &mut state.gates {
            gate.form = [Form::Open, Form::Fenced, Form::Target][usize::from(bits.take(2))];
            gate.epoch = bits.take(3);
            gate.expired = bits.take(1) == 1;
        }
        state.controller.duty = DUTIES[usize::from(bits.take(3))];
        state.controller.epoch = bits.take(3);
        state.controller.crashes_left = bits.take(3);
        state.writer.transaction =
            [Transaction::None, Transaction::Snapshot, Transaction::Wrote][usize::from(bits.take(2))];
        state.writer.side = side(bits.take(1));
        state.writer.seen = bits.take(4);
        state.owner = side(bits.take(1));
        state
    }
}

const PHASES: [Phase; 5] = [Phase::Down, Phase::Looking, Phase::Serving, Phase::Held, Phase::Asking];
const DUTIES: [Duty; 5] = [Duty::Idle, Duty::Pausing, Duty::Fencing, Duty::Deciding, Duty::Aborting];

const fn side(bit: u8) -> Side {
    if bit == 0 { Side::Blue } else { Side::Green }
}

/// A word that is filled and emptied from its low end.
#[derive(Default)]
struct Bits {
    word: u128,
    at: u32,
}

impl Bits {
    fn put(&mut self, width: u32, value: u8) {
        debug_assert!(u32::from(value) < 1 << width, "{value} does not fit {width} bits");
        self.word |= u128::from(value) << self.at;
        self.at += width;
        debug_assert!(self.at <= 128, "the state outgrew its packed form");
    }

    fn take(&mut self, width: u32) -> u8 {
        let value = (self.word >> self.at) & ((1 << width) - 1);
        self.at += width;
        u8::try_from(value).unwrap_or(u8::MAX) // widths are at most 7
    }
}
