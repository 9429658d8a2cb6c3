//! One state of the whole system, and its packed form.
//!
//! Invariant: `State::unpack(state.pack()) == state` for every state within [`PROXIES_MAX`] and [`EPOCHS_MAX`].

/// More proxies do not fit the packed form.
pub const PROXIES_MAX: usize = 3;
/// More epochs do not fit the packed form.
pub const EPOCHS_MAX: usize = 4;
/// A crash budget of this size is not counted: any number of crashes.
pub const CRASHES_ANY: u8 = 3;

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
    ///
    /// In `proxy/api/sql/objects.sql`: flip.
    Flip,
    /// `guard` on the target.
    ///
    /// In `proxy/api/sql/objects.sql`: guard.
    Guard,
    /// `unfence` on the source.
    ///
    /// In `proxy/api/sql/objects.sql`: unfence.
    Unfence,
    /// `settle` on the target.
    ///
    /// In `proxy/api/sql/objects.sql`: settle.
    Settle,
    /// `decide(commit)` on the source.
    ///
    /// In `proxy/api/sql/objects.sql`: decide.
    Commit,
    /// `decide(abort)` on the source.
    ///
    /// In `proxy/api/sql/objects.sql`: decide.
    Abort,
    /// The subscription from the source is dropped on the target: S10.
    ///
    /// In `control/src/steps/reverse.rs`: attach, drop_subscription.
    Detach,
    /// The old source subscribes to the slot of S6 on the target: S10.
    ///
    /// In `control/src/steps/reverse.rs`: attach.
    Attach,
    /// SWITCH to the proxies.
    ///
    /// In `proxy/src/database/switch.rs`: switch.
    Switch,
    /// RESUME to the proxies.
    ///
    /// In `proxy/src/database/pause.rs`: resume_with.
    Resume,
}

impl Sent {
    /// Those that arrive at a server.
    pub const TO_SERVERS: [Self; 8] =
        [Self::Flip, Self::Guard, Self::Unfence, Self::Settle, Self::Commit, Self::Abort, Self::Detach, Self::Attach];
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
    sent: u16,
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
    /// The epoch of its route, which names its active backend: see [`State::route`].
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
    /// S10: the subscription from the source is being dropped.
    Detaching,
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

/// What the other side lacks of the writes that one side acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// Nothing.
    Nothing,
    /// Something that a subscription or a slot keeps for it.
    Kept,
    /// Something that no subscription will ever bring.
    Gone,
}

/// Logical replication away from one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The other side is subscribed.
    pub attached: bool,
    /// The epoch whose S6 made a slot here that nobody is subscribed to; 0 for none.
    pub slot: u8,
    /// What the other side lacks.
    pub lack: Lack,
}

/// One proxy that can't reach one server; the rest of its network works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Which proxy.
    pub proxy: usize,
    /// Which server.
    pub side: Side,
}

/// What may become of the network between the proxies and the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Nothing.
    Whole,
    /// One proxy at a time may be cut off from one server.
    Cuts,
}

/// How many of everything. The listed proxies come first, then the members, then the strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Proxies that the controller was told of.
    pub listed: usize,
    /// Proxies that nobody told it of, but that enrolled themselves in the source's store.
    pub members: usize,
    /// Proxies that nobody knows of.
    pub strangers: usize,
    /// Epochs that may be opened.
    pub epochs: usize,
    /// Controller crashes; [`CRASHES_ANY`] for any number.
    pub crashes: u8,
    /// Whether it breaks.
    pub network: Network,
    /// Data moves: subscriptions, slots, catch-up, the way back.
    pub data: bool,
}

impl Shape {
    /// Nobody yet: two epochs, a whole network, no data. A search adds what it is about.
    pub const BASE: Self = Self {
        listed: 0,
        members: 0,
        strangers: 0,
        epochs: 2,
        crashes: CRASHES_ANY,
        network: Network::Whole,
        data: false,
    };

    /// Whether a proxy may be cut off.
    pub const fn cuts(self) -> bool {
        match self.network {
            Network::Whole => false,
            Network::Cuts => true,
        }
    }

    /// All proxies.
    pub const fn proxies(self) -> usize {
        self.listed + self.members + self.strangers
    }

    /// Those that the controller takes care of: listed and members.
    pub const fn heeded(self) -> usize {
        self.listed + self.members
    }
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
    /// By [`Side::index`] of the side that is replicated.
    pub links: [Link; 2],
    /// Who is cut off from what.
    pub cut: Option<Cut>,
    /// The controller.
    pub controller: Controller,
    /// The writer past the proxies.
    pub writer: Writer,
    /// Whose the database is: blue, until a commit is decided on the owner.
    pub owner: Side,
    /// The database was moved to a side that lacked something.
    pub lost: bool,
}

impl State {
    /// Everything on blue, every proxy serving, green subscribed.
    pub const fn first(crashes: u8) -> Self {
        let epoch = Epoch { source: Side::Blue, outcome: Outcome::Undecided, evidence: false, sent: 0 };
        let proxy = Proxy { phase: Phase::Serving, hold: 0, leaseless: false, route_epoch: 0 };
        let gate = Gate { form: Form::Open, epoch: 0, expired: false };
        Self {
            last: 0,
            epochs: [epoch; EPOCHS_MAX],
            proxies: [proxy; PROXIES_MAX],
            gates: [gate; 2],
            links: [
                Link { attached: true, slot: 0, lack: Lack::Kept },
                Link { attached: false, slot: 0, lack: Lack::Nothing },
            ],
            cut: None,
            controller: Controller { duty: Duty::Idle, epoch: 0, crashes_left: crashes },
            writer: Writer { transaction: Transaction::None, side: Side::Blue, seen: 0 },
            owner: Side::Blue,
            lost: false,
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

    /// The active backend of a proxy: where its route's epoch went, or the configuration's.
    pub const fn route(&self, proxy: usize) -> Side {
        match self.proxies[proxy].route_epoch {
            0 => Side::Blue,
            number => self.epoch(number).source.other(),
        }
    }

    /// Whether the network between a proxy and a server is cut.
    pub fn is_cut(&self, proxy: usize, side: Side) -> bool {
        self.cut == Some(Cut { proxy, side })
    }

    /// Replication away from a side.
    pub const fn link(&self, from: Side) -> &Link {
        &self.links[from.index()]
    }

    /// Replication away from a side.
    pub const fn link_mut(&mut self, from: Side) -> &mut Link {
        &mut self.links[from.index()]
    }

    /// All of it in 128 bits.
    pub fn pack(&self) -> u128 {
        let mut bits = Bits::default();
        bits.put(3, self.last);
        for epoch in &self.epochs {
            bits.put(1, epoch.source as u8);
            bits.put(2, if epoch.evidence { EVIDENT } else { epoch.outcome as u8 });
            bits.put_wide(SENT_BITS, epoch.sent);
        }
        self.proxies.iter().for_each(|proxy| bits.put(10, proxy.code()));
        for gate in &self.gates {
            // Which form it is follows from whether the side is the epoch's source.
            bits.put(3, gate.epoch);
            bits.put(1, u8::from(gate.expired));
        }
        for link in &self.links {
            bits.put(1, u8::from(link.attached));
            bits.put(3, link.slot);
            bits.put(2, link.lack as u8);
        }
        bits.put(3, self.cut.map_or(0, |cut| 1 + (cut.proxy as u8) * 2 + cut.side as u8));
        bits.put(3, self.controller.duty as u8);
        bits.put(3, self.controller.epoch);
        bits.put(2, self.controller.crashes_left);
        bits.put(2, self.writer.transaction as u8);
        bits.put(1, self.writer.side as u8);
        bits.put(4, self.writer.seen);
        bits.put(1, self.owner as u8);
        bits.put(1, u8::from(self.lost));
        bits.word
    }

    /// The state that packs to these bits.
    pub fn unpack(word: u128) -> Self {
        let mut bits = Bits { word, at: 0 };
        let mut state = Self::first(0);
        state.last = bits.take(3);
        for epoch in &mut state.epochs {
            epoch.source = side(bits.take(1));
            let outcome = bits.take(2);
            epoch.evidence = outcome == EVIDENT;
            epoch.outcome =
                [Outcome::Undecided, Outcome::Commit, Outcome::Abort, Outcome::Commit][usize::from(outcome)];
            epoch.sent = bits.take_wide(SENT_BITS);
        }
        state.proxies.iter_mut().for_each(|proxy| *proxy = Proxy::of_code(bits.take_wide(10)));
        for at in [Side::Blue, Side::Green] {
            let epoch = bits.take(3);
            let expired = bits.take(1) == 1;
            let form = match epoch {
                0 => Form::Open,
                number if state.epoch(number).source == at => Form::Fenced,
                _ => Form::Target,
            };
            state.gates[at.index()] = Gate { form, epoch, expired };
        }
        for link in &mut state.links {
            link.attached = bits.take(1) == 1;
            link.slot = bits.take(3);
            link.lack = [Lack::Nothing, Lack::Kept, Lack::Gone][usize::from(bits.take(2))];
        }
        state.cut = bits.take(3).checked_sub(1).map(|cut| Cut { proxy: usize::from(cut / 2), side: side(cut % 2) });
        state.controller.duty = DUTIES[usize::from(bits.take(3))];
        state.controller.epoch = bits.take(3);
        state.controller.crashes_left = bits.take(2);
        state.writer.transaction =
            [Transaction::None, Transaction::Snapshot, Transaction::Wrote][usize::from(bits.take(2))];
        state.writer.side = side(bits.take(1));
        state.writer.seen = bits.take(4);
        state.owner = side(bits.take(1));
        state.lost = bits.take(1) == 1;
        state
    }

    /// The same state with the proxies of each kind in one order: which of them is which makes no difference.
    pub fn sorted(&self, shape: Shape) -> Self {
        let mut order = [0, 1, 2];
        let key = |&proxy: &usize| {
            let cut = self.cut.filter(|cut| cut.proxy == proxy).map_or(0, |cut| 1 + cut.side as u16);
            (self.proxies[proxy].code(), cut)
        };
        let (listed, rest) = order.split_at_mut(shape.listed);
        let (members, strangers) = rest.split_at_mut(shape.members);
        let strangers = &mut strangers[..shape.strangers];
        [listed, members, strangers].into_iter().for_each(|kind| kind.sort_by_key(key));
        let mut next = *self;
        next.proxies = order.map(|proxy| self.proxies[proxy]);
        let moved =
            |cut: Cut| Cut { proxy: order.iter().position(|&proxy| proxy == cut.proxy).unwrap_or(cut.proxy), ..cut };
        next.cut = self.cut.map(moved);
        next
    }
}

impl Proxy {
    /// All of it in ten bits.
    fn code(&self) -> u16 {
        let flags = (u16::from(self.leaseless) << 3) | self.phase as u16;
        (u16::from(self.route_epoch) << 7) | (u16::from(self.hold) << 4) | flags
    }

    fn of_code(code: u16) -> Self {
        let bits = |at: u16, width: u16| ((code >> at) & ((1 << width) - 1)) as u8;
        Self {
            phase: PHASES[usize::from(bits(0, 3))],
            leaseless: bits(3, 1) == 1,
            hold: bits(4, 3),
            route_epoch: bits(7, 3),
        }
    }
}

/// A commit with its evidence, where the outcome is packed.
const EVIDENT: u8 = 3;
/// One for each [`Sent`].
const SENT_BITS: u32 = 10;
const PHASES: [Phase; 5] = [Phase::Down, Phase::Looking, Phase::Serving, Phase::Held, Phase::Asking];
const DUTIES: [Duty; 6] = [Duty::Idle, Duty::Pausing, Duty::Fencing, Duty::Deciding, Duty::Aborting, Duty::Detaching];

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
    fn put(&mut self, width: u32, value: impl Into<u16>) {
        self.put_wide(width, value.into());
    }

    fn put_wide(&mut self, width: u32, value: u16) {
        debug_assert!(u32::from(value) < 1 << width, "{value} does not fit {width} bits");
        self.word |= u128::from(value) << self.at;
        self.at += width;
        debug_assert!(self.at <= 128, "the state outgrew its packed form");
    }

    fn take(&mut self, width: u32) -> u8 {
        u8::try_from(self.take_wide(width)).unwrap_or(u8::MAX) // widths are at most 8
    }

    fn take_wide(&mut self, width: u32) -> u16 {
        let value = (self.word >> self.at) & ((1 << width) - 1);
        self.at += width;
        u16::try_from(value).unwrap_or(u16::MAX) // widths are at most 10
    }
}
