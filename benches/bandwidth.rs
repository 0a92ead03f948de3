//! How fast all cores together read memory: the limit of decoding. Prints one JSON line.
//!
//!     cargo run --release -p opt-benches --bin bandwidth

use opt_benches::{bandwidth, threads};

fn main() {
    println!("{{\"threads\": {}, \"gb_s\": {:.2}}}", threads(), bandwidth() * 1e-9);
}
