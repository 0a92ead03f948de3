// The largest of a row of numbers and the sum of exp(number - largest), in one pass. To be included after `reduce`, for
// 256 threads.

struct Part { largest: f32, sum: f32 }

const LOWEST: f32 = -3.402823e38;
var<workgroup> shared_largest: array<f32, 256>;

fn columns_of(k: u32) -> vec4<u32> { return vec4<u32>(4u * k) + vec4<u32>(0u, 1u, 2u, 3u); }

// With quad k of the row.
fn with_quad(part: Part, numbers: vec4<f32>, k: u32) -> Part {
    let inside = columns_of(k) < vec4<u32>(args.width);
    let v = select(vec4<f32>(LOWEST), numbers, inside);
    let largest = max(max(part.largest, max(v.x, v.y)), max(v.z, v.w));
    let e = select(vec4<f32>(0.0), exp(v - largest), inside);
    return Part(largest, part.sum * exp(part.largest - largest) + dot(e, vec4<f32>(1.0)));
}

// The parts of all threads.
fn joined(part: Part, thread: u32) -> Part {
    workgroupBarrier();
    shared_largest[thread] = part.largest;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { shared_largest[thread] = max(shared_largest[thread], shared_largest[thread + half]); }
    }
    workgroupBarrier();
    let largest = shared_largest[0];
    return Part(largest, total(part.sum * exp(part.largest - largest), thread));
}
