//! Gradient hooks: when they run, what they see, and what becomes of their errors.
#![allow(clippy::unwrap_used)]

use lockstep_nn::NnError;
use lockstep_nn::shim::{backward, on_gradient};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

fn leaf(value: f64) -> Tensor {
    Tensor::from_slice(&[value]).set_requires_grad(true)
}

#[test]
fn gradients_arrive_one_by_one_from_the_last_layer_to_the_first_each_once_and_complete() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let leaves: Vec<_> = [2.0, 3.0, 5.0].into_iter().map(leaf).collect();
    let _hooks: Vec<_> = leaves
        .iter()
        .enumerate()
        .map(|(i, l)| {
            let seen = seen.clone();
            let push = move |g: &Tensor| {
                seen.lock().unwrap().push((i, g.double_value(&[0])));
                Ok(())
            };
            on_gradient(l, push).unwrap()
        })
        .collect();
    for _ in 0..2 {
        // The middle leaf is used twice: its gradient is final only after both. d/db of −a·b·c·b is −2abc.
        let loss = (-&leaves[0] * &leaves[1] * &leaves[2] * &leaves[1]).sum(None);
        backward(&loss).unwrap();
        let order: Vec<_> = std::mem::take(&mut *seen.lock().unwrap());
        assert_eq!(order, [(2, -18.0), (1, -60.0), (0, -45.0)]);
        assert!(leaves.iter().all(|l| !l.grad().defined()), "gradients are handed over, not kept");
    }
}

#[test]
fn an_early_hook_runs_before_the_backward_of_earlier_layers() {
    // Two layers; the later one's hook fails, so the earlier one's must never run.
    let (first, second) = (leaf(2.0), leaf(3.0));
    let ran = Arc::new(Mutex::new(false));
    let flag = ran.clone();
    let _early = on_gradient(&second, |_| Err(NnError::Torch("stop".into()))).unwrap();
    let _late = on_gradient(&first, move |_| {
        *flag.lock().unwrap() = true;
        Ok(())
    })
    .unwrap();
    let loss = (first.exp().sin() * &second).sum(None);
    assert!(backward(&loss).is_err());
    assert!(!*ran.lock().unwrap());
}

#[test]
fn an_error_of_a_callback_comes_out_of_backward_with_its_type() {
    let l = leaf(1.0);
    let fail = |_: &Tensor| Err(NnError::Exchange(Box::new(std::io::Error::other("link cut"))));
    let hook = on_gradient(&l, fail).unwrap();
    let error = backward(&(&l * 2.0).sum(None)).unwrap_err();
    assert!(matches!(&error, NnError::Exchange(e) if e.is::<std::io::Error>()), "{error}");
    drop(hook);
    backward(&(&l * 2.0).sum(None)).unwrap();
    assert_eq!(l.grad().double_value(&[0]), 2.0, "a dropped hook takes no more gradients");
}

#[test]
fn a_panic_of_a_callback_becomes_an_error() {
    let l = leaf(1.0);
    let _hook = on_gradient(&l, |_| panic!("bucket {} is full", 4)).unwrap();
    let error = backward(&(&l * 2.0).sum(None)).unwrap_err();
    assert!(matches!(&error, NnError::Panic(text) if text == "bucket 4 is full"), "{error}");
}

#[test]
fn hooks_are_refused_on_tensors_that_get_no_gradient_and_a_second_time() {
    let none = || |_: &Tensor| Ok(());
    let constant = Tensor::zeros([1], (Kind::Double, Device::Cpu));
    assert!(on_gradient(&constant, none()).unwrap_err().to_string().contains("needs a leaf"));
    let l = leaf(1.0);
    assert!(on_gradient(&(&l * 1.0), none()).is_err());
    let _hook = on_gradient(&l, none()).unwrap();
    assert!(on_gradient(&l, none()).unwrap_err().to_string().contains("hook already"));
}

#[test]
fn backward_without_a_graph_is_an_error_of_one_line() {
    let message = backward(&Tensor::from(1.0)).unwrap_err().to_string();
    assert!(message.contains("does not require grad") && !message.contains("Exception raised"), "{message}");
}
