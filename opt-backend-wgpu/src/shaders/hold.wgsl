// Numbers of a tensor as weights hold them, then zeros.

struct Args {
    // Quads written, those of them that come from x, and where both begin.
    count: u32,
    taken: u32,
    from_at: u32,
    to_at: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> out: array<$UNIT>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;

#if BF16
// Rounds to nearest, ties to even; NaN stays NaN.
fn upper(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn encode(v: vec4<f32>, largest: f32) -> vec2<u32> {
    return vec2<u32>(upper(v.x) | (upper(v.y) << 16u), upper(v.z) | (upper(v.w) << 16u));
}
#else
#include encode
#endif

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    if (i >= args.count) { return; }
    var v = vec4<f32>(0.0);
    if (i < args.taken) { v = x[args.from_at + i]; }
    out[args.to_at + i] = encode(v, 0.0);
}
