//! The searches of the table in ARCHITECTURE.md.
//!
//! Invariant: each is complete in 6 GiB.

use crate::state::Network;
use crate::state::Shape;

const BASE: Shape = Shape::BASE;

/// All of them, in the table's order. The largest takes 1.4 GB, and all of them about half an hour of one core.
pub const SHAPES: [Shape; 14] = [
    Shape { listed: 2, ..BASE },
    Shape { listed: 3, ..BASE },
    Shape { listed: 3, epochs: 3, ..BASE },
    Shape { listed: 1, epochs: 4, ..BASE },
    Shape { listed: 2, members: 1, ..BASE },
    Shape { listed: 2, strangers: 1, ..BASE },
    Shape { listed: 1, members: 1, strangers: 1, ..BASE },
    Shape { listed: 2, members: 1, epochs: 3, ..BASE },
    Shape { listed: 3, network: Network::Cuts, ..BASE },
    Shape { listed: 2, members: 1, network: Network::Cuts, ..BASE },
    Shape { listed: 2, epochs: 3, network: Network::Cuts, ..BASE },
    Shape { listed: 3, data: true, ..BASE },
    Shape { listed: 2, epochs: 3, data: true, ..BASE },
    Shape { listed: 1, epochs: 4, data: true, ..BASE },
];
