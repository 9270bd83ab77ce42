"One step of a stage, for the tests of several chapters."

import torch

from cxr_book.learner import make_optimizer, set_trainable, train_mode


def step(net, batch, stage):
    "Take one step of a stage; return its losses and the parts of the network whose weights or statistics moved."
    opt = make_optimizer(stage.but(lr=1e-2), set_trainable(net, stage.trainable))
    train_mode(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    losses = net.loss(batch, stage.name)
    losses["loss"].backward()
    opt.step()
    return losses, {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
