"""Put an edit back into the photograph it was made from."""

from typing import Literal

import numpy as np
from PIL import Image

from step1x_edit.images import change as ch, detail as dt, colour_map as cm

Keep = Literal["auto", "always", "off"]
STRIP_ROWS = 256
RIM_PX=2
FEATHER_PX=2

def to_float(a):
    a=np.asarray(a)
    return a.astype(np.float32)/255 if a.dtype==np.uint8 else a.astype(np.float32)

def up(field, box, size, how=Image.Resampling.BILINEAR):
    """field (h,w) -> size (W,H)"""
    return np.asarray(Image.fromarray(np.ascontiguousarray(field,dtype=np.float32)).resize(size,how,box=box))

def restore(rgb, before, after, prepared, keep='auto', debug=None):
    from scipy import ndimage
    before,after=to_float(before),to_float(after)
    c=ch.find_change(before,after,to_float(prepared))
    chroma=lambda x: ch.distance(ch.smooth(x-cm.grey(x),2.0))
    cb,ca=np.quantile(chroma(before),.9),np.quantile(chroma(after),.95)
    is_grey=ca<max(4/255,0.6*c.noise) and cb>3*ca
    q=c.colour_map(before); ch2=lambda x: ch.distance(x-cm.grey(x))
    cc=lambda x: ch.distance(ch.smooth(x-cm.grey(x),3.0))
    qa,qb=np.quantile(ch2(q),.95),np.quantile(ch2(before),.9)
    is_grey=qa<3/255 and qb>max(5/255,3*qa) and np.quantile(cc(after),.98)<max(6/255,c.noise)
    h,w=before.shape[:2]
    groups=[]
    if is_grey: after=cm.grey(after)
    if c.is_global or is_grey:
        base=cm.fit(before.reshape(-1,3),after.reshape(-1,3),c.noise)
        if is_grey: base=base.as_grey()
        groups=[(np.ones((h,w),np.float32),np.ones((h,w),np.float32),base)]
    else:
        lab,n=ndimage.label(ndimage.binary_dilation(c.region,np.ones((3,3)),iterations=RIM_PX+FEATHER_PX))
        for i in range(1,n+1):
            rim=lab==i
            core=rim&c.region
            d=ndimage.distance_transform_edt(~core)
            mask=np.clip((RIM_PX+FEATHER_PX+.5-d)/FEATHER_PX,0,1).astype(np.float32)
            wts=rim
            base=cm.fit(before[wts],after[wts],c.noise)
            groups.append((mask,wts.astype(np.float32),base))
    out=np.array(rgb)
    dbg=[]
    for mask,wts,base in groups:
        e=dt.explain(before,after,base,wts,c.noise_field,c.edge_noise,c.is_global or is_grey)
        dbg.append((mask,e))
        compose(out,rgb,mask,e,after)
    if debug is not None: debug.update(change=c,groups=dbg,is_grey=is_grey,ca=ca*255,cb=cb*255)
    return Image.fromarray(out)

def compose(out,rgb,mask,e,after):
    H,W=out.shape[:2]; h,w=mask.shape
    for y in range(0,H,STRIP_ROWS):
        y1=min(H,y+STRIP_ROWS); box=(0,y*h/H,w,y1*h/H); size=(W,y1-y)
        m=up(mask,box,size)[...,None]
        if not m.any(): continue
        src=rgb.crop((0,y,W,y1))
        s=np.asarray(src,np.float32)/255
        b=np.asarray(e.base.apply(src),np.float32)/255
        p=b+np.stack([up(e.offset[...,o],box,size) for o in range(3)],2)
        for i in range(3):
            for o in range(3):
                p[...,o]+=s[...,i]*up(e.slopes[...,i,o],box,size)
        u=up(e.replaced,box,size)[...,None]
        r=np.stack([up(after[...,o],box,size,Image.Resampling.LANCZOS) for o in range(3)],2)
        v=np.clip((p*(1-u)+r*u),0,1)
        new=np.round(255*(s*(1-m)+v*m)).astype(np.uint8)
        out[y:y1]=np.where(m>0,new,out[y:y1])
