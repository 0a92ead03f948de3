// The loss of each row of a student's logits against a teacher's at a temperature, and its gradient in the place of the
// student's logits: a workgroup a row.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    // Row of the losses at which this dispatch begins.
    first: u32,
    temperature: f32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> student: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;
@group(0) @binding(3) var<storage, read> teacher: array<vec4<f32>>;

#include reduce
#include softmax

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= args.rows) { return; }
    let at = row * args.quads;
    let t = args.temperature;
    var of_student = Part(LOWEST, 0.0);
    var of_teacher = Part(LOWEST, 0.0);
    for (var k = thread; k < args.quads; k += 256u) {
        of_student = with_quad(of_student, student[at + k] / t, k);
        of_teacher = with_quad(of_teacher, teacher[at + k] / t, k);
    }
    let s = joined(of_student, thread);
    let p = joined(of_teacher, thread);
    let log_ratio = log(s.sum / p.sum);
    var loss = 0.0;
    for (var k = thread; k < args.quads; k += 256u) {
        let inside = columns_of(k) < vec4<u32>(args.width);
        let vs = student[at + k] / t - s.largest;
        let vp = teacher[at + k] / t - p.largest;
        let weight = exp(vp) / p.sum;
        // Where the teacher's weight is nothing, so is the loss, whatever its logarithm.
        let counts = select(vec4<bool>(false), inside, weight > vec4<f32>(0.0));
        let of_quad = select(vec4<f32>(0.0), weight * (vp - vs + log_ratio), counts);
        loss += dot(of_quad, vec4<f32>(1.0));
        student[at + k] = select(vec4<f32>(0.0), args.scale * t * (exp(vs) / s.sum - weight), inside);
    }
    let all = total(loss, thread);
    if (thread == 0u) { losses[args.first + row] = t * t * all; }
}
