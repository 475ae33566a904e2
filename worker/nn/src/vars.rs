//! The variables of one network: parameters, which learn, and buffers, which are set.
//!
//! A worker holds one master set. Every logical shard's thread builds its own module objects over a
//! [`Vars::replica`], whose tensors are the master's memory with an autograd identity of their own, so that the
//! shards' graphs are independent and no weight is copied.

use crate::error::NnError;
use crate::init::Init;
use std::collections::{BTreeMap, BTreeSet};
use tch::{Device, Kind, Tensor, no_grad};

/// What a variable is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Learns from gradients.
    Parameter,
    /// Set outside of backward, such as a running mean.
    Buffer,
}

/// One variable of a network.
#[derive(Debug)]
pub struct Var {
    /// The values.
    pub tensor: Tensor,
    /// What it is for.
    pub role: Role,
}

impl Var {
    /// Whether weight decay usually applies: to weights, not to the vectors (biases, gamma and beta).
    pub fn decays(&self) -> bool {
        self.role == Role::Parameter && self.tensor.dim() > 1
    }
}

/// The variables of one network, in name order.
#[derive(Debug)]
pub struct Vars {
    network: String,
    seed: u64,
    kind: Kind,
    device: Device,
    entries: BTreeMap<String, Var>,
    creation: Creation,
    batch_norms: u32,
}

/// What happens when a model that is being built asks for a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Creation {
    /// It is created with its initial values.
    Initialized,
    /// It is created as one zero that is seen at every place.
    Outlined,
    /// It must be there.
    Sealed,
}

impl Vars {
    /// An empty set, to be filled by building a model over its [`root`](Self::root).
    ///
    /// `network` is the network's name in its job ("model", "generator", ...): with `seed` and a parameter's
    /// name it keys the initial values.
    pub fn new(network: &str, seed: u64, kind: Kind, device: Device) -> Self {
        let network = network.to_owned();
        let entries = BTreeMap::new();
        Self { network, seed, kind, device, entries, creation: Creation::Initialized, batch_norms: 0 }
    }

    /// An empty set whose variables will have names and shapes and no memory.
    pub fn outline(network: &str) -> Self {
        Self { creation: Creation::Outlined, ..Self::new(network, 0, Kind::Float, Device::Cpu) }
    }

    /// The number type of all variables.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the variables are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The variables of this outline with the values of `saved`, which must hold exactly these names and shapes, all
    /// of type `kind`.
    pub fn filled(
        &self,
        kind: Kind,
        device: Device,
        saved: &BTreeMap<String, Tensor>,
    ) -> Result<Self, NnError> {
        let problems = misfits(self.iter().map(|(name, var)| (name, &var.tensor, kind)), saved);
        if !problems.is_empty() {
            return Err(NnError::Load { what: "network", problems });
        }
        let fill = |(name, var): (&String, &Var)| -> Result<(String, Var), NnError> {
            let mut tensor = saved[name].f_empty_like()?.f_to_device(device)?;
            no_grad(|| tensor.f_copy_(&saved[name]))?;
            Ok((name.clone(), Var { tensor, role: var.role }))
        };
        Ok(Self {
            network: self.network.clone(),
            kind,
            device,
            entries: self.entries.iter().map(fill).collect::<Result<_, _>>()?,
            creation: Creation::Sealed,
            ..*self
        })
    }

    /// Where building a model starts.
    pub fn root(&mut self) -> Scope<'_> {
        self.batch_norms = 0;
        Scope { vars: self, prefix: String::new() }
    }

    /// All variables in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.entries.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// The parameters in name order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.iter().filter(|(_, var)| var.role == Role::Parameter)
    }

    /// The variable `name`, or an error that says that there is none.
    pub fn var(&self, name: &str) -> Result<&Var, NnError> {
        self.entries.get(name).ok_or_else(|| NnError::Variable {
            name: name.to_owned(),
            problem: format!("does not exist in network `{}`", self.network),
        })
    }

    /// How many numbers learn.
    pub fn parameter_count(&self) -> u64 {
        self.parameters().map(|(_, var)| var.tensor.numel() as u64).sum()
    }

    /// The same memory, with parameters that are autograd leaves of their own.
    pub fn replica(&self) -> Result<Self, NnError> {
        self.alias(true)
    }

    /// The same memory, with nothing that learns: for evaluation, and for a network that another one learns
    /// through.
    pub fn frozen(&self) -> Result<Self, NnError> {
        self.alias(false)
    }

    fn alias(&self, learns: bool) -> Result<Self, NnError> {
        let alias = |(name, var): (&String, &Var)| -> Result<(String, Var), NnError> {
            let tensor = var.tensor.f_detach()?;
            let tensor = tensor.f_set_requires_grad(learns && var.role == Role::Parameter)?;
            Ok((name.clone(), Var { tensor, role: var.role }))
        };
        Ok(Self {
            network: self.network.clone(),
            entries: self.entries.iter().map(alias).collect::<Result<_, _>>()?,
            creation: Creation::Sealed,
            batch_norms: 0,
            ..*self
        })
    }

    /// A copy of all values, for a checkpoint to write while training goes on.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>, NnError> {
        let copy = |(name, var): (&str, &Var)| -> Result<(String, Tensor), NnError> {
            let values = var.tensor.f_detach()?;
            let mut copy = values.f_empty_like()?;
            copy.f_copy_(&values)?;
            Ok((name.to_owned(), copy))
        };
        self.iter().map(copy).collect()
    }

    /// Sets all variables from `saved`, which must hold exactly these names, shapes and types. On an error,
    /// which names every key that does not fit, nothing has changed.
    pub fn load(&mut self, saved: &BTreeMap<String, Tensor>) -> Result<(), NnError> {
        let mine =
            self.entries.iter().map(|(name, var)| (name.clone(), var.tensor.shallow_clone())).collect();
        load_tensors("network", &mine, saved)
    }
}

/// What is wrong with `saved` as the values of tensors of these names, shapes and types.
fn misfits<'a>(
    mine: impl Iterator<Item = (&'a str, &'a Tensor, Kind)>,
    saved: &BTreeMap<String, Tensor>,
) -> Vec<String> {
    let (mut problems, mut known) = (Vec::new(), BTreeSet::new());
    for (name, tensor, kind) in mine {
        known.insert(name);
        match saved.get(name) {
            None => problems.push(format!("`{name}` is missing")),
            Some(s) if s.size() != tensor.size() => {
                problems.push(format!("`{name}` has shape {:?} instead of {:?}", s.size(), tensor.size()));
            }
            Some(s) if s.kind() != kind => {
                problems.push(format!("`{name}` has type {:?} instead of {kind:?}", s.kind()));
            }
            Some(_) => {}
        }
    }
    let unknown = saved.keys().filter(|k| !known.contains(k.as_str()));
    problems.extend(unknown.map(|k| format!("`{k}` is unknown")));
    problems
}

/// Copies `saved` into `mine`, all or nothing; the error names every key that does not fit.
pub(crate) fn load_tensors(
    what: &'static str,
    mine: &BTreeMap<String, Tensor>,
    saved: &BTreeMap<String, Tensor>,
) -> Result<(), NnError> {
    let problems = misfits(mine.iter().map(|(name, t)| (name.as_str(), t, t.kind())), saved);
    if !problems.is_empty() {
        return Err(NnError::Load { what, problems });
    }
    no_grad(|| {
        for (name, tensor) in mine {
            tensor.detach().f_copy_(&saved[name])?;
        }
        Ok(())
    })
}

/// A place in a network's tree of names, where a layer asks for its variables.
#[derive(Debug)]
pub struct Scope<'a> {
    vars: &'a mut Vars,
    prefix: String,
}

impl Scope<'_> {
    /// The place `name` below this one.
    pub fn sub(&mut self, name: &str) -> Scope<'_> {
        let prefix = self.full_name(name);
        Scope { vars: self.vars, prefix }
    }

    /// The full name of this place.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// The number of the next batch norm of this network, in the order of construction.
    pub(crate) fn next_batch_norm(&mut self) -> u32 {
        self.vars.batch_norms += 1;
        self.vars.batch_norms - 1
    }

    /// The parameter `name` here: created with `init`, or found in a replica's variables.
    pub fn parameter(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor, NnError> {
        self.variable(name, shape, init, Role::Parameter)
    }

    /// The buffer `name` here, with every element `value` when it is created.
    pub fn buffer(&mut self, name: &str, shape: &[i64], value: f64) -> Result<Tensor, NnError> {
        self.variable(name, shape, Init::Constant(value), Role::Buffer)
    }

    fn variable(&mut self, name: &str, shape: &[i64], init: Init, role: Role) -> Result<Tensor, NnError> {
        let name = self.full_name(name);
        let fault = |name: &str, problem: String| Err(NnError::Variable { name: name.to_owned(), problem });
        if self.vars.creation == Creation::Sealed {
            let var = self.vars.var(&name)?;
            return if var.role == role && var.tensor.size() == shape {
                Ok(var.tensor.shallow_clone())
            } else {
                fault(&name, format!("is a {:?} of shape {:?}", var.role, var.tensor.size()))
            };
        }
        if self.vars.entries.contains_key(&name) {
            return fault(&name, "is asked for twice".to_owned());
        }
        let tensor = match self.vars.creation {
            Creation::Outlined => {
                Tensor::f_zeros([1], (self.vars.kind, self.vars.device))?.f_expand(shape, false)?
            }
            _ => self.draw(&name, shape, init)?,
        };
        self.vars.entries.insert(name, Var { tensor: tensor.shallow_clone(), role });
        Ok(tensor)
    }

    fn draw(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor, NnError> {
        let count = shape.iter().product::<i64>() as usize;
        let values = init.draw(self.vars.seed, &self.vars.network, name, count);
        let tensor = Tensor::f_from_slice(&values)?.f_reshape(shape)?.f_to_kind(self.vars.kind)?;
        Ok(tensor.f_to_device(self.vars.device)?)
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vars {
        let mut vars = Vars::new("model", 7, Kind::Double, Device::Cpu);
        let mut root = vars.root();
        let _ = root.sub("fc").parameter("weight", &[2, 3], Init::fan_in(3)).unwrap();
        let _ = root.sub("fc").buffer("seen", &[2], 1.0).unwrap();
        vars
    }

    #[test]
    fn initial_values_depend_on_seed_network_and_name_only() {
        let draw = |network, seed, name: &str| {
            let mut vars = Vars::new(network, seed, Kind::Double, Device::Cpu);
            let _ = vars.root().parameter("earlier", &[5], Init::Normal { std: 1.0 }).unwrap();
            let t = vars.root().parameter(name, &[4], Init::Normal { std: 1.0 }).unwrap();
            Vec::<f64>::try_from(t).unwrap()
        };
        assert_eq!(draw("g", 1, "w"), draw("g", 1, "w"));
        assert_ne!(draw("g", 1, "w"), draw("d", 1, "w"));
        assert_ne!(draw("g", 1, "w"), draw("g", 2, "w"));
        assert_ne!(draw("g", 1, "w"), draw("g", 1, "v"));
    }

    #[test]
    fn replica_shares_memory_and_is_a_leaf_of_its_own() {
        let vars = sample();
        let replica = vars.replica().unwrap();
        let (master, leaf) =
            (&vars.var("fc.weight").unwrap().tensor, &replica.var("fc.weight").unwrap().tensor);
        assert_eq!(master.data_ptr(), leaf.data_ptr());
        assert!(leaf.requires_grad() && leaf.is_leaf() && !master.requires_grad());
        assert!(!replica.var("fc.seen").unwrap().tensor.requires_grad());
        assert!(!vars.frozen().unwrap().var("fc.weight").unwrap().tensor.requires_grad());
    }

    #[test]
    fn sealed_variables_refuse_names_and_shapes_they_lack() {
        let mut replica = sample().replica().unwrap();
        assert!(replica.root().parameter("other", &[1], Init::Constant(0.0)).is_err());
        assert!(replica.root().sub("fc").parameter("weight", &[3, 2], Init::Constant(0.0)).is_err());
        assert!(replica.root().sub("fc").parameter("weight", &[2, 3], Init::Constant(0.0)).is_ok());
    }

    #[test]
    fn load_names_every_bad_key_and_changes_nothing() {
        let mut vars = sample();
        let before = vars.snapshot().unwrap();
        let mut saved = vars.snapshot().unwrap();
        saved.insert("fc.seen".into(), Tensor::from_slice(&[5.0, 5.0]));
        saved.insert("fc.weight".into(), Tensor::zeros([3, 2], (Kind::Double, Device::Cpu)));
        saved.insert("fc.bias".into(), Tensor::from_slice(&[0.0]));
        let message = vars.load(&saved).unwrap_err().to_string();
        assert!(message.contains("`fc.weight` has shape [3, 2] instead of [2, 3]"), "{message}");
        assert!(message.contains("`fc.bias` is unknown"), "{message}");
        for (name, var) in vars.iter() {
            assert_eq!(var.tensor, before[name]);
        }
        saved.remove("fc.bias");
        saved.insert("fc.weight".into(), Tensor::ones([2, 3], (Kind::Double, Device::Cpu)));
        vars.load(&saved).unwrap();
        assert_eq!(vars.var("fc.weight").unwrap().tensor, saved["fc.weight"]);
        saved.insert("fc.weight".into(), Tensor::ones([2, 3], (Kind::Float, Device::Cpu)));
        saved.remove("fc.seen");
        let message = vars.load(&saved).unwrap_err().to_string();
        assert!(message.contains("`fc.seen` is missing") && message.contains("type Float instead of Double"));
    }
}
