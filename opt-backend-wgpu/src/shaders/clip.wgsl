// What gradients are multiplied by so that the norm of all of them is at most max_norm.
fn clip_factor() -> f32 {
#if CLIP
    return min(args.max_norm / (sqrt(squares[0]) + 1e-6), 1.0);
#else
    return 1.0;
#endif
}
