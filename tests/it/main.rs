//! Everything that is tested with namespaces, programs or servers: one binary. Needs root.

mod lab;
